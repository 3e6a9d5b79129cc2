"""The header of a WebP file (RFC 9649)."""

from __future__ import annotations

import struct
from typing import Final

from models.images.errors import DamagedImageError
from models.images.header import Cost, Header

_MAX_CHUNKS: Final = 10_000
_BYTES_PER_PIXEL: Final = 16  # two canvases, and two more copies of RGBA pixels


def read(data: bytes) -> Header:
    """See `models.images.formats.read_header`."""
    width, height = (0, 0) if data[12:16] != b"VP8X" else _two_24_bits(data, 24)
    position, image = 12, None
    for _ in range(_MAX_CHUNKS):
        kind = data[position : position + 4]
        if len(kind) < 4:
            break
        (length,) = struct.unpack_from("<I", data, position + 4)
        if image is None:
            image = _bitstream_size(data, position)
            if kind == b"ANMF":
                # Behind the frame's own header; transparency may come first.
                inner = position + 24
                if data[inner : inner + 4] == b"ALPH":
                    inner += 8 + _even(struct.unpack_from("<I", data, inner + 4)[0])
                image = _bitstream_size(data, inner)
        position += 8 + _even(length)
    else:
        raise DamagedImageError(f"the WebP has more than {_MAX_CHUNKS:,} chunks")
    if image is None:
        raise DamagedImageError("damaged WebP: there is no image in it")
    # One frame is decoded, onto a canvas that libwebp makes before it compares the two sizes.
    width, height = width or image[0], height or image[1]
    pixels = max(width * height, image[0] * image[1])
    seconds = 40e-9 * pixels + 25e-9 * len(data)
    return Header("WEBP", width, height, Cost(seconds, _BYTES_PER_PIXEL * pixels + 2 * len(data)))


def _bitstream_size(data: bytes, position: int) -> tuple[int, int] | None:
    """Width and height from the chunk at `position`, if it holds an image."""
    kind, body = data[position : position + 4], position + 8
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, body + 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, body + 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _two_24_bits(data: bytes, position: int) -> tuple[int, int]:
    first, second = data[position : position + 3], data[position + 3 : position + 6]
    return int.from_bytes(first, "little") + 1, int.from_bytes(second, "little") + 1


def _even(length: int) -> int:
    return int(length) + (length & 1)
