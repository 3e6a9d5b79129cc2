"""Image files that cost as much as their formats allow: for the tests, and for `benchmarks.decoding_cost`."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import Image, ImageFile

pillow_heif.register_heif_opener()  # to write them

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
Tags: TypeAlias = "dict[int, tuple[int, int, int]]"
"""Type, count and value (or offset) by number."""

_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def saved(image: Image.Image | NDArray[np.uint8], form: str, **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    before, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, 1 << 26  # Pillow writes progressive JPEGs in one block
    try:
        picture.save(file, form, **options)
    finally:
        ImageFile.MAXBLOCK = before
    return file.getvalue()


def noise(width: int, height: int) -> NDArray[np.uint8]:
    """RGB pixels that no format compresses."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth areas with the noise of a camera."""
    smooth = Image.fromarray(noise(max(2, width // 16), max(2, height // 16)))
    pixels = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = np.random.default_rng(1).integers(-6, 7, (height, width, 1), np.int16)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """A PNG's chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    interlaced: bool = False,
    row_filter: int = 0,
    before: Iterable[bytes] = (),
    after: Iterable[bytes] = (),
) -> bytes:
    """A PNG whose samples are all zero.

    Args:
        width: in pixels.
        height: in pixels.
        depth: bits a sample.
        colour: PNG's colour type.
        interlaced: the pixels come in seven passes.
        row_filter: of every row.
        before: chunks before the pixels.
        after: chunks behind them.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    row = bytes([row_filter]) + bytes((width * _CHANNELS[colour] * depth + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(
        [*(packer.compress(row) for _ in range(2 * height if interlaced else height)), packer.flush()]
    )
    palette = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
    body = [chunk(b"IHDR", header), palette, *before, chunk(b"IDAT", pixels), *after, chunk(b"IEND")]
    return _SIGNATURE + b"".join(body)


def segment(marker: int, content: bytes) -> bytes:
    """A JPEG's segment."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _codes(kind: int, *symbols: int) -> bytes:
    """A Huffman table whose symbols have one, two, … bits."""
    lengths = [*[1] * len(symbols), *[0] * (16 - len(symbols))]
    return segment(0xC4, bytes([kind, *lengths, *symbols]))


def _scan(components: int, first: int, last: int, approximation: int, bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    listed = b"".join(bytes([number + 1, 0]) for number in range(components))
    return segment(0xDA, bytes([components]) + listed + bytes([first, last, approximation])) + data


def _jpeg(marker: int, width: int, height: int, sampling: Sequence[int], parts: Iterable[bytes]) -> bytes:
    components = b"".join(bytes([number + 1, factors, 0]) for number, factors in enumerate(sampling))
    frame = struct.pack(">BHHB", 8, height, width, len(sampling)) + components
    head = [b"\xff\xd8", segment(0xDB, bytes([0, *[1] * 64])), segment(marker, frame)]
    return b"".join([*head, *parts, b"\xff\xd9"])


def grey_jpeg(width: int, height: int, sampling: Sequence[int] = (0x11, 0x11, 0x11)) -> bytes:
    """A baseline JPEG of middle grey, with any sampling factors: each a digit across and a digit down."""
    across, down = max(f >> 4 for f in sampling), max(f & 15 for f in sampling)
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    blocks = units * sum((f >> 4) * (f & 15) for f in sampling)
    parts = [_codes(0x00, 0), _codes(0x10, 0), _scan(len(sampling), 0, 63, 0, "00" * blocks)]
    return _jpeg(0xC0, width, height, sampling, parts)


def progressive_jpeg(width: int, height: int, scans: int, *, refining: bool = False) -> bytes:
    """A grey JPEG of many scans, each of which says for every block that nothing changes."""
    blocks = -(-width // 8) * -(-height // 8)
    # Ends of band, for 32767 blocks at once or for one.
    nothing = ("0" + "1" * 14) * (blocks // 32767) + "10" * (blocks % 32767)
    parts = [_codes(0x00, 0), _codes(0x10, 0xE0, 0x00), _scan(1, 0, 0, 0, "0" * blocks)]
    if refining:
        parts.append(_scan(1, 1, 63, 0x01, nothing))
    parts += [_scan(1, 1, 63, 0x10 if refining else 0x00, nothing)] * scans
    return _jpeg(0xC2, width, height, (0x11,), parts)


def tiff(tags: Tags, data: bytes = b"", *, offset_tag: int = 273) -> bytes:
    """A little-endian TIFF.

    Args:
        tags: all but the place of the data.
        data: the file's end.
        offset_tag: gets the place of `data` as its value.
    """
    tags = tags | {offset_tag: (4, 1, 8 + 2 + 12 * (len(tags) + (offset_tag not in tags)) + 4)}
    body = b""
    for number, (kind, count, value) in sorted(tags.items()):
        packed = struct.pack("<HH", value, 0) if kind == 3 and count == 1 else struct.pack("<I", value)
        body += struct.pack("<HHI", number, kind, count) + packed
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


def tiff_tags(width: int, height: int, compression: int = 1, length: int = 0) -> Tags:
    """The tags of a grey TIFF of one strip of `length` bytes."""
    longs = {256: width, 257: height, 278: height, 279: length}
    shorts = {258: 8, 259: compression, 262: 1, 277: 1}
    return {
        **{number: (4, 1, value) for number, value in longs.items()},
        **{number: (3, 1, value) for number, value in shorts.items()},
    }


def tiled_tiff(width: int, height: int, tile: int) -> bytes:
    """A deflated TIFF whose one square tile is as large as one likes."""
    data = zlib.compress(bytes(4096), 9)
    tags = tiff_tags(width, height, 8)
    for strips in (278, 279):
        del tags[strips]
    tags |= {322: (4, 1, tile), 323: (4, 1, tile), 325: (4, 1, len(data))}
    return tiff(tags, data, offset_tag=324)


def run_length_bmp(width: int, height: int) -> bytes:
    """A bitmap of which each row is one pixel and an end of line, which Pillow fills a byte at a time."""
    rows = b"\x01\x00\x00\x00" * height
    palette = bytes(4 * 256)
    offset = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + header + palette + rows
