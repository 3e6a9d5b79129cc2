"""Whether an ONNX graph keeps weights in other files: found without the onnx package, which devices lack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

# The fields of onnx.proto that lead to tensors: message: {field: message in it}.
_INNER: Final = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 10: "tensor", 22: "sparse tensor", 23: "sparse tensor"},
        **{6: "graph", 11: "graph"},
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": dict[int, str](),
}
_EXTERNAL_DATA: Final = 13
_DATA_LOCATION: Final = 14

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types; groups are not used
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}


def has_external_data(model: bytes) -> bool:
    """Whether any tensor of `model`, a serialised `ModelProto`, refers to another file.

    Raises:
        ValueError: not a protobuf message.
    """
    messages = [("model", memoryview(model))]
    while messages:
        kind, message = messages.pop()
        inner = _INNER[kind]
        for field, value in _fields(message):
            if kind == "tensor" and (field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value != 0)):
                return True
            if field in inner and isinstance(value, memoryview):
                messages.append((inner[field], value))
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message; numbers of fixed size are left out."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            number, at = _varint(message, at)
            yield field, number
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise ValueError(f"no wire type {wire}")
        if size > len(message) - at:
            raise ValueError("it ends in the middle of a field")
        if wire == _BYTES:
            yield field, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends in the middle of a number")
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number is too long")
