"""Whether an ONNX graph keeps weights in other files: found without the onnx package, which devices lack."""

from __future__ import annotations

from typing import Final

from builder.protobuf import fields

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


def has_external_data(model: bytes) -> bool:
    """Whether any tensor of `model`, a serialised `ModelProto`, refers to another file.

    Raises:
        ValueError: not a protobuf message.
    """
    messages = [("model", memoryview(model))]
    while messages:
        kind, message = messages.pop()
        inner = _INNER[kind]
        for field, value, _ in fields(message):
            if kind == "tensor" and (field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value != 0)):
                return True
            if field in inner and isinstance(value, memoryview):
                messages.append((inner[field], value))
    return False
