"""The header of a PNG file (PNG specification, third edition, sections 5 and 11)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from models.images.errors import DamagedImageError
from models.images.header import Cost, Header

# By colour type.
_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PALETTE: Final = 3
_PIXEL_DATA: Final = (b"IDAT", b"fdAT")
_INFLATED: Final = (b"iCCP", b"zTXt", b"iTXt")  # Pillow inflates each, to at most 1 MiB
_MAX_CHUNKS: Final = 50_000
_PIXELS_AT: Final = 41  # of a file whose first chunk is that of its pixels
_END: Final = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_LAST_FILTER: Final = 4
_SMALL: Final = 4096  # bytes before compression; to check so many takes a hundredth of a millisecond


@dataclass(slots=True)
class PngHeader(Header):
    """A PNG file's header.

    Attributes:
        raw: bytes of the pixels before compression, with a byte for each row's filter.
        plain: there are few of these, in one chunk, and the file has nothing else.
    """

    raw: int
    plain: bool

    def is_sound(self, data: bytes) -> bool:
        """Whether a plain file is without a fault that libpng would find."""
        pixels, checksum, end = data[_PIXELS_AT:-16], data[-16:-12], data[-12:]
        if end != _END or zlib.crc32(b"IDAT" + pixels) != int.from_bytes(checksum, "big"):
            return False
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(pixels, self.raw + 1)
        except zlib.error:
            return False
        filters = raw[:: self.raw // self.height]
        return (
            len(raw) == self.raw and inflate.eof and not inflate.unused_data and max(filters) <= _LAST_FILTER
        )


def read(data: bytes) -> PngHeader:
    """See `models.images.formats.read_header`."""
    if data[8:16] != b"\0\0\0\x0dIHDR":
        raise DamagedImageError("damaged PNG: it does not begin with its header")
    if data[29:33] != struct.pack(">I", zlib.crc32(data[12:29])):
        raise DamagedImageError("damaged PNG: the checksum of its header is wrong")
    width, height, depth, colour, *methods, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _DEPTHS.get(colour, ()):
        raise DamagedImageError("damaged PNG: no such colour type or bit depth")
    compressed = pieces = others = inflated = metadata = 0
    position = 33  # behind the header
    for _ in range(_MAX_CHUNKS):
        kind = data[position + 4 : position + 8]
        if len(kind) < 4 or kind == b"IEND":
            break
        (length,) = struct.unpack_from(">I", data, position)
        if kind in _PIXEL_DATA:
            compressed += length
            pieces += 1
        elif kind == b"IHDR":
            raise DamagedImageError("damaged PNG: it has two headers")
        else:
            metadata += length
            others += 1
            inflated += kind in _INFLATED
        position += 12 + length
    else:
        raise DamagedImageError(f"the PNG has more than {_MAX_CHUNKS:,} chunks")
    pixels = width * height
    raw = height * (1 + (width * depth * _CHANNELS[colour] + 7) // 8)
    compressed, metadata = min(compressed, len(data)), min(metadata, len(data))
    seconds = (
        (24e-9 if interlaced else 12e-9) * pixels
        + 5e-9 * raw  # by the dearest of the filters; without one it takes half of that
        + 17e-9 * compressed
        + 20e-9 * metadata
        + 5e-6 * pieces
        + 12e-6 * others
        + 5e-3 * inflated
    )
    memory = 7 * pixels + 4 * metadata + (3 << 20) * inflated
    plain = compressed == len(data) - _PIXELS_AT - 16 and pieces == 1 and 0 < raw <= _SMALL
    plain = plain and not any(methods) and not interlaced and colour != _PALETTE
    return PngHeader("PNG", width, height, Cost(seconds, memory), raw, plain)
