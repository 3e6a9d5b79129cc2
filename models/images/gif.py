"""The header of a GIF file, up to its first frame (GIF89a specification)."""

from __future__ import annotations

import struct
from typing import Final

from models.images.errors import DamagedImageError
from models.images.header import Cost, Header

_EXTENSION: Final = 0x21
_FRAME: Final = 0x2C
_END: Final = 0x3B
_MAX_BLOCKS: Final = 20_000  # before the first frame; Pillow reads each in Python


def read(data: bytes) -> Header:
    """See `models.images.formats.read_header`."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _palette_bytes(flags)
    in_extension = False
    blocks = 0
    while blocks < _MAX_BLOCKS:
        blocks += 1
        first = data[position]
        if in_extension:
            in_extension = first != 0
            position += 1 + first
        elif first == _EXTENSION:
            in_extension = True
            position += 2
        elif first == _FRAME:
            x, y, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            break
        elif first == _END:
            raise DamagedImageError("damaged GIF: there is no frame in it")
        else:
            position += 1  # as Pillow does
    else:
        raise DamagedImageError(f"the GIF has more than {_MAX_BLOCKS:,} blocks before its first frame")
    width, height = max(width, x + frame_width), max(height, y + frame_height)
    pixels = width * height
    seconds = 14e-9 * pixels + 18e-9 * len(data) + 2e-6 * blocks
    return Header("GIF", width, height, Cost(seconds, 5 * pixels + 3 * len(data)))


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
