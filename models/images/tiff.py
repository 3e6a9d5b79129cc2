"""The header of a TIFF file: the directory of its first image (TIFF 6.0)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from models.images.directory import Directories, Tag
from models.images.errors import DamagedImageError, UnsupportedImageError
from models.images.header import Cost, Header

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_STRIP_OFFSETS, _ROWS_PER_STRIP, _PLANAR = 273, 278, 284
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1  # of `_PHOTOMETRIC`
_SIGNED, _FLOAT = 2, 3  # of `_SAMPLE_FORMAT`
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 322, 323, 324
_DEPTHS: Final = (32997, 32998)  # of an image and of a tile, in voxels
_SUBDIRECTORIES: Final = (34665, 34853, 40965)  # EXIF, GPS, interoperability: Pillow reads them all
_MAX_TAGS: Final = 300  # photographs in raw formats have 80

# Seconds by byte of pixels, and by byte of the file.
_RATES: Final = {
    1: (5e-9, 0.0),  # none
    32773: (6e-9, 0.0),  # PackBits
    5: (5e-9, 3e-9),  # LZW
    8: (5e-9, 20e-9),  # Deflate
    32946: (5e-9, 20e-9),
    50000: (5e-9, 3e-9),  # Zstandard
    2: (200e-9, 100e-9),  # facsimile: eight pixels in a byte
    3: (200e-9, 100e-9),
    4: (200e-9, 100e-9),
    34925: (20e-9, 30e-9),  # LZMA
}
# JPEG with up to a hundred scans in each strip, which libtiff allows, and others that nobody sends.
_OTHER_RATE: Final = (200e-9, 100e-9)
_OTHER_MEMORY: Final = 100 << 20  # libtiff lets libjpeg take that much


@dataclass(slots=True)
class TiffHeader(Header):
    """A TIFF's header.

    Attributes:
        bits: of a sample.
        samples: of a pixel.
        black_is_zero: where in the file to write what, so that Pillow reads an image whose white is zero as
            its negative; None where it reads the image itself.
    """

    bits: int
    samples: int
    black_is_zero: tuple[int, bytes] | None


def read(data: bytes) -> TiffHeader:
    """See `models.images.formats.read_header`."""
    try:
        directories = Directories(data)
        tags: dict[int, Tag] = {}
        for tag in directories.tags(directories.first, _MAX_TAGS + 1):
            if tag.number in tags:
                raise DamagedImageError(f"damaged TIFF: tag {tag.number} comes twice")
            tags[tag.number] = tag
        everything = [*tags.values(), *_subtags(directories, tags)]
        if len(everything) > _MAX_TAGS or sum(tag.size for tag in everything) > len(data):
            raise DamagedImageError("the TIFF has too many tags, or more in them than in the file")
        return _header(data, directories, tags, everything)
    except ValueError as error:
        raise DamagedImageError(f"damaged TIFF: {error}") from error


def _subtags(directories: Directories, tags: dict[int, Tag]) -> list[Tag]:
    found: list[Tag] = []
    waiting = [tags[number] for number in _SUBDIRECTORIES if number in tags]
    while waiting and len(found) <= _MAX_TAGS:
        (offset,) = directories.integers(waiting.pop(), 1) or (0,)
        for tag in directories.tags(offset, _MAX_TAGS + 1):
            found.append(tag)
            if tag.number in _SUBDIRECTORIES:
                waiting.append(tag)
    return found


def _header(data: bytes, directories: Directories, tags: dict[int, Tag], everything: list[Tag]) -> TiffHeader:
    def number(tag: int, default: int | None = None) -> int:
        if tag not in tags:
            if default is None:
                raise ValueError(f"tag {tag} is missing")
            return default
        values = directories.integers(tags[tag], 1)
        if not values or values[0] < 0:
            raise ValueError(f"tag {tag} has no value")
        return values[0]

    width, height, samples = number(_WIDTH), number(_HEIGHT), number(_SAMPLES, 1)
    bits = max(directories.integers(tags[_BITS], 16), default=1) if _BITS in tags else 1
    kind = number(_SAMPLE_FORMAT, 1)
    if bits > 16 or kind in (_SIGNED, _FLOAT):
        name = f"{bits}-bit {'floating-point ' if kind == _FLOAT else 'signed ' if kind == _SIGNED else ''}"
        raise UnsupportedImageError(
            f"{name}images are not supported; convert it to 8 or 16 unsigned bits a channel"
        )
    if any(number(tag, 1) != 1 for tag in _DEPTHS):
        raise UnsupportedImageError("three-dimensional TIFF files are not supported")
    if _STRIP_OFFSETS in tags or _TILE_OFFSETS not in tags:
        tile_width, tile_height, offsets = width, min(number(_ROWS_PER_STRIP, height), height), _STRIP_OFFSETS
    else:
        tile_width, tile_height, offsets = number(_TILE_WIDTH), number(_TILE_HEIGHT), _TILE_OFFSETS
    if min(width, height, samples, tile_width, tile_height) < 1:
        raise ValueError("a size is zero")
    planes = samples if number(_PLANAR, 1) == 2 else 1
    if planes > 1 and bits > 8:
        raise UnsupportedImageError("TIFFs of more than 8 bits in separate planes are not supported")
    across, down = math.ceil(width / tile_width), math.ceil(height / tile_height)
    # Pillow decodes every tile that is listed, libtiff every one that there should be.
    tiles = max(across * down * planes, tags[offsets].values if offsets in tags else 0)
    tile_bytes = tile_height * math.ceil(tile_width * bits * (samples // planes) / 8)
    compression = number(_COMPRESSION, 1)
    by_byte, by_file_byte = _RATES.get(compression, _OTHER_RATE)
    pixels = max(width * height, tiles * tile_width * tile_height // planes)
    seconds = (
        8e-9 * pixels
        + by_byte * tiles * tile_bytes
        + by_file_byte * len(data)
        + 15e-6 * tiles
        + 4 * sum(tag.seconds for tag in everything)
    )
    memory = (
        8 * width * height
        + 2 * tile_bytes
        + 100 * tiles
        + sum(40 * tag.values for tag in everything if tag.seconds > 15e-6)
        + (0 if compression in _RATES else _OTHER_MEMORY)
    )
    white_is_zero = number(_PHOTOMETRIC, _BLACK_IS_ZERO) == _WHITE_IS_ZERO
    black = None
    if white_is_zero and (bits > 8 or samples > 1):
        tag = tags[_PHOTOMETRIC]
        black = tag.position, _BLACK_IS_ZERO.to_bytes(tag.size, "little" if data[:1] == b"I" else "big")
    return TiffHeader("TIFF", width, height, Cost(seconds, memory), bits, samples, black)
