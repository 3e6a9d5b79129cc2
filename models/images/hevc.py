"""How large a picture in HEVC is, and how much of it there is to decode (ITU-T H.265)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from models.images.bits import Bits
from models.images.errors import DamagedImageError

_VIDEO_SETTINGS, _SEQUENCE_SETTINGS, _PICTURE_SETTINGS = 32, 33, 34  # kinds of units (table 7-1)
_LAST_SLICE: Final = 31
_MAX_UNITS: Final = 16  # of a picture, or of its settings
_PROFILE_BITS, _LEVEL_BITS = 88, 8
_MAX_SETTINGS: Final = 256  # bytes of a sequence's settings that are looked at


def read(settings: bytes, data: bytes) -> tuple[int, int, int]:
    """Width and height in pixels, and how many slices there are, each of which may code all of the picture.

    Args:
        settings: the property `hvcC` (ISO/IEC 14496-15).
        data: units behind their lengths.

    Raises:
        DamagedImageError: no picture, several, or settings where there may be none.
        struct.error: it ends too early.
    """
    width, height = _picture_size(settings)
    slices = pictures = 0
    for unit in _units(data, (settings[21] & 3) + 1):
        if _kind(unit) in (_VIDEO_SETTINGS, _SEQUENCE_SETTINGS, _PICTURE_SETTINGS):
            raise DamagedImageError("damaged HEIF: the decoder's settings change within a picture")
        if _kind(unit) <= _LAST_SLICE:
            slices += 1
            pictures += unit[2] >> 7  # whether it is the first of a picture
    if pictures != 1:
        raise DamagedImageError(f"damaged HEIF: it has {pictures} pictures in one")
    return width, height, slices


def _kind(unit: bytes) -> int:
    return unit[0] >> 1 & 63


@lru_cache(maxsize=16)  # all tiles of an image have the same
def _picture_size(settings: bytes) -> tuple[int, int]:
    sizes, position, units = [], 23, 0
    for _ in range(settings[22]):
        (count,) = struct.unpack_from(">H", settings, position + 1)
        position += 3
        units += count
        if units > _MAX_UNITS:
            raise DamagedImageError(f"the HEIF has more than {_MAX_UNITS} settings for its decoder")
        for _ in range(count):
            (length,) = struct.unpack_from(">H", settings, position)
            unit = settings[position + 2 : position + 2 + length]
            if _kind(unit) == _SEQUENCE_SETTINGS:
                sizes.append(_size(unit))
            position += 2 + length
    if len(sizes) != 1:
        raise DamagedImageError("damaged HEIF: a picture has not one size")
    return sizes[0]


def _units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The first bytes of each unit."""
    position = 0
    for _ in range(_MAX_UNITS):
        if position == len(data):
            return
        length = int.from_bytes(data[position : position + length_size], "big")
        position += length_size
        # No unit ends with a zero (section 7.4.2.1); decoders pass over what a broken download left as zeros.
        if length < 3 or position + length > len(data) or not data[position + length - 1]:
            raise DamagedImageError("damaged HEIF: a picture is truncated")
        yield data[position : position + 3]
        position += length
    raise DamagedImageError(f"the HEIF has more than {_MAX_UNITS} units in a picture")


def _size(unit: bytes) -> tuple[int, int]:
    """Width and height from a sequence's settings (section 7.3.2.2)."""
    bits = Bits(unit[2:_MAX_SETTINGS].replace(b"\0\0\3", b"\0\0"))
    bits.number(4)
    layers = bits.number(3)
    bits.number(1 + _PROFILE_BITS + _LEVEL_BITS)
    there = [(bits.number(1), bits.number(1)) for _ in range(layers)]
    if layers:
        bits.number(2 * (8 - layers))
    for profile, level in there:
        bits.number(profile * _PROFILE_BITS + level * _LEVEL_BITS)
    bits.exponential()
    if bits.exponential() == 3:  # three planes of one size
        bits.number(1)
    return bits.exponential(), bits.exponential()
