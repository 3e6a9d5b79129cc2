"""Protocol Buffers on the wire, as far as ONNX files need them: devices lack the onnx package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups are not used
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: its field number.
        value: an unsigned integer, or bytes (text, a message, packed numbers); None: of fixed size, not read.
        encoded: the whole field, as it stands in the message.
    """

    number: int
    value: int | memoryview | None
    encoded: memoryview


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message, in order.

    Raises:
        ValueError: not a message.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        value: int | memoryview | None = None
        if wire == _VARINT:
            value, at = _varint(message, at)
        else:
            if wire == _BYTES:
                size, at = _varint(message, at)
            elif wire in _FIXED_SIZES:
                size = _FIXED_SIZES[wire]
            else:
                raise ValueError(f"no wire type {wire}")
            if size > len(message) - at:
                raise ValueError("it ends in the middle of a field")
            if wire == _BYTES:
                value = message[at : at + size]
            at += size
        yield Field(number, value, message[start:at])


def numbers(packed: memoryview) -> Iterator[int]:
    """Packed integers, as `int64` means them.

    Raises:
        ValueError: it ends in the middle of one.
    """
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield signed(value)


def signed(value: int) -> int:
    """An integer of the wire as `int64` means it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def encode(number: int, value: int | bytes | memoryview) -> bytes:
    """A field with a number that is not negative, or with bytes."""
    if isinstance(value, int):
        return _encoded(number << 3 | _VARINT) + _encoded(value)
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + bytes(value)


def _encoded(number: int) -> bytes:
    octets = bytearray()
    while number > 0x7F:
        octets.append(number & 0x7F | 0x80)
        number >>= 7
    octets.append(number)
    return bytes(octets)


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
