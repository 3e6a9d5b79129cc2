"""How large a picture in AV1 is, and how much of it there is to decode (AV1 bitstream specification)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from models.images.bits import Bits
from models.images.errors import DamagedImageError, UnsupportedImageError

_SEQUENCE, _FRAME_HEADER, _FRAME, _TILE_LIST = 1, 3, 6, 8  # kinds of units (section 6.2.2)
_MAX_UNITS: Final = 16
_MAX_HEADER: Final = 128  # bytes of a sequence's header that are looked at


def read(settings: bytes, data: bytes) -> tuple[int, int, int]:
    """Width and height in pixels, and how many frames there are.

    Args:
        settings: the property `av1C`, which decoders of still pictures do not need.
        data: units.

    Raises:
        DamagedImageError: no picture.
        UnsupportedImageError: one of an unusual kind.
        struct.error: it ends too early.
    """
    del settings
    sizes, frames = set(), 0
    for kind, content in _units(data):
        if kind == _SEQUENCE:
            sizes.add(_size(content))
        elif kind in (_FRAME_HEADER, _FRAME):
            frames += 1
        elif kind == _TILE_LIST:
            raise UnsupportedImageError("AVIF images of lists of tiles are not supported")
    if len(sizes) != 1 or not frames:
        raise DamagedImageError("damaged AVIF: it has no picture, or not one size")
    return *sizes.pop(), frames


def _units(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and first bytes of each unit (section 5.3)."""
    position = 0
    for _ in range(_MAX_UNITS):
        if position == len(data):
            return
        head = data[position]
        position += 2 if head & 4 else 1
        length = len(data) - position
        if head & 2:
            length, position = _number(data, position)
        if length > len(data) - position:
            raise DamagedImageError("damaged AVIF: a picture is truncated")
        yield head >> 3 & 15, data[position : position + min(length, _MAX_HEADER)]
        position += length
    raise DamagedImageError(f"the AVIF has more than {_MAX_UNITS} units in a picture")


def _number(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for place in range(8):
        value |= (data[position + place] & 0x7F) << 7 * place
        if not data[position + place] & 0x80:
            return value, position + place + 1
    raise DamagedImageError("damaged AVIF: a length has no end")


def _size(header: bytes) -> tuple[int, int]:
    """Width and height from a sequence's header (section 5.5.1)."""
    bits = Bits(header)
    bits.number(3 + 1)
    if bits.number(1):  # the short form, of still pictures
        bits.number(5)
    else:
        if bits.number(1):
            raise UnsupportedImageError("AVIF images with times, as films have, are not supported")
        delays = bits.number(1)
        for _ in range(bits.number(5) + 1):
            bits.number(12)
            if bits.number(5) > 7:
                bits.number(1)
            if delays and bits.number(1):
                bits.number(4)
    wide, high = bits.number(4) + 1, bits.number(4) + 1
    return bits.number(wide) + 1, bits.number(high) + 1
