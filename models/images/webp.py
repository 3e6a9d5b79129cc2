"""The header of a WebP file (RFC 9649)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from models.images.errors import DamagedImageError
from models.images.header import Cost, Header
from models.images.metadata import orientation

_EXIF, _XMP, _ANIMATION = 0x08, 0x04, 0x02  # flags of the extended format
_MAX_CHUNKS: Final = 10_000


@dataclass(slots=True)
class WebpHeader(Header):
    """A WebP's header.

    Attributes:
        animated: it has frames.
        orientation: from its EXIF data or XMP packet; 1 if they have none.
    """

    animated: bool
    orientation: int


def read(data: bytes) -> WebpHeader:
    """See `models.images.formats.read_header`."""
    extended = data[12:16] == b"VP8X"
    flags = data[20] if extended else 0
    width, height = _two_24_bits(data, 24) if extended else (0, 0)
    position, image = 12, None
    exif = xmp = None
    for _ in range(_MAX_CHUNKS):
        kind = data[position : position + 4]
        if len(kind) < 4:
            break
        (length,) = struct.unpack_from("<I", data, position + 4)
        if image is None:
            image = _bitstream_size(data, position)
            if kind == b"ANMF":
                image = _bitstream_size(data, _image_of_frame(data, position))
        if kind == b"EXIF" and exif is None and flags & _EXIF:
            exif = data[position + 8 : position + 8 + length]
        elif kind == b"XMP " and xmp is None and flags & _XMP:
            xmp = data[position + 8 : position + 8 + length]
        position += 8 + _even(length)
    else:
        raise DamagedImageError(f"the WebP has more than {_MAX_CHUNKS:,} chunks")
    if image is None:
        raise DamagedImageError("damaged WebP: there is no image in it")
    # One frame is decoded, onto a canvas that libwebp makes before it compares the two sizes.
    width, height = width or image[0], height or image[1]
    pixels = max(width * height, image[0] * image[1])
    animated = bool(flags & _ANIMATION)
    # Pillow decodes animations, and holds the interpreter's lock meanwhile: large ones would stall others.
    by_pixel, bytes_by_pixel = (250e-9, 20) if animated else (40e-9, 11)
    cost = Cost(by_pixel * pixels + 25e-9 * len(data), bytes_by_pixel * pixels + len(data))
    return WebpHeader("WEBP", width, height, cost, animated, orientation(exif, xmp) or 1)


def _image_of_frame(data: bytes, position: int) -> int:
    """Where the image of the frame at `position` begins, behind the frame's header and transparency."""
    inner = position + 24
    if data[inner : inner + 4] == b"ALPH":
        inner += 8 + _even(struct.unpack_from("<I", data, inner + 4)[0])
    return inner


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
    return length + (length & 1)
