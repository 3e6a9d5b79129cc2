"""The header of a Windows bitmap."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from models.images.errors import DamagedImageError
from models.images.header import Cost, Header

_RUN_LENGTH: Final = (1, 2)  # compression, of pixels of eight and four bits
_SECOND_TRY_SECONDS: Final = 0.05


@dataclass(slots=True)
class BmpHeader(Header):
    """A bitmap's header.

    Attributes:
        run_length: its pixels are compressed.
        second_try: so small that Pillow, in Python, may decode what OpenCV refuses: runs beyond their row.
    """

    run_length: bool
    second_try: bool


def read(data: bytes) -> BmpHeader:
    """See `models.images.formats.read_header`."""
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = colours = 0
    elif size >= 40:
        width, height, _, bits, compression = struct.unpack_from("<IIHHI", data, 18)
        (colours,) = struct.unpack_from("<I", data, 46)
        if data[25] == 0xFF:  # stored from the top
            height = 2**32 - height
    else:
        raise DamagedImageError("damaged BMP: its header has no known size")
    pixels = width * height
    palette = min(colours, 65_536) if bits <= 8 else 0
    run_length = compression in _RUN_LENGTH
    in_python = 150e-9 * pixels + 700e-9 * len(data) if run_length else 0.0
    second_try = 0 < in_python < _SECOND_TRY_SECONDS
    seconds = 12e-9 * pixels + 0.5e-6 * palette + (in_python if second_try else 0)
    if run_length:
        seconds += 10e-9 * len(data)
    return BmpHeader("BMP", width, height, Cost(seconds, 8 * pixels), run_length, second_try)
