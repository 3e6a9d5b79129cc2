"""The header of a JPEG file, and the work that its scans make (ITU-T T.81)."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from models.images.errors import DamagedImageError
from models.images.header import Cost, Header
from models.images.metadata import orientation

_DIVISORS: Final = (8, 4, 2)  # libjpeg-turbo's vector code; other eighths take longer than no shrinking

# Markers (table B.1)
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = 0xC2
_HUFFMAN: Final = (0xC0, 0xC1, _PROGRESSIVE)
_WITHOUT_LENGTH: Final = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # 0: no marker, but a byte of data
_END_OF_IMAGE: Final = 0xD9
_START_OF_SCAN: Final = 0xDA
_APP1: Final = 0xE1
_TABLES: Final = (0xC4, 0xDB)

_MAX_SEGMENTS: Final = 5000  # before the first scan; each file of 64 KiB of colour profile has one
_MAX_SCANS: Final = 1000
_SCAN: Final = bytes([0xFF, _START_OF_SCAN])
# EXIF data, further pictures and Photoshop's notes.
_NOTES: Final = re.compile(rb"(\xff[\xe1\xe2\xed]..)(?:Exif|MPF\0|Phot)", re.DOTALL)


class _Component(NamedTuple):
    number: int
    blocks: int  # of 8x8 samples


@dataclass(slots=True)
class JpegHeader(Header):
    """A JPEG's header.

    Attributes:
        orientation: from its EXIF data; 1 if they have none.
        components: 1 for grey, 3 for colour, 4 for CMYK.
        plain: without what libjpeg-turbo's simple interface refuses: bytes between segments.
        entropy_seconds: time of decoding that does not depend on the size of the result.
        coefficients: bytes that libjpeg has to hold until the last scan.
    """

    orientation: int
    components: int
    plain: bool
    entropy_seconds: float
    coefficients: int

    def divisor(self, smallest: float) -> int:
        """How many times smaller it may be decoded while its shorter side keeps `smallest` pixels."""
        if self.components == 4:
            return 1
        shorter = min(self.width, self.height)
        return next((number for number in _DIVISORS if math.ceil(shorter / number) >= smallest), 1)

    def cost(self, smallest: float) -> Cost:
        """See `Header`."""
        divisor = self.divisor(smallest)
        pixels = math.ceil(self.width / divisor) * math.ceil(self.height / divisor)
        by_pixel = 20e-9 if self.components == 4 else 8e-9
        return Cost(self.entropy_seconds + by_pixel * pixels, self.coefficients + 7 * pixels)


def read(data: bytes) -> JpegHeader:
    """See `models.images.formats.read_header`."""
    exif, frame, kind, plain = None, None, 0, True
    position, tables = 2, 0
    for _ in range(_MAX_SEGMENTS):
        if data[position] != 0xFF:
            position = data.find(b"\xff", position)
            if position < 0:
                raise DamagedImageError("damaged JPEG: it ends before its first scan")
            plain = False
        marker = data[position + 1]
        if marker == 0xFF:  # any number of fill bytes may precede a marker
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            plain = False
            position += 2
            continue
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        if length < 2:
            raise DamagedImageError("damaged JPEG: a segment is too short")
        if marker in _FRAMES:
            if frame is not None:
                raise DamagedImageError("damaged JPEG: it has two frames")
            frame, kind = data[position + 4 : position + 2 + length], marker
        elif marker in _TABLES:
            tables += length
        elif marker == _APP1 and exif is None and data[position + 4 : position + 10] == b"Exif\0\0":
            exif = data[position + 4 : position + 2 + length]
        position += 2 + length
    else:
        raise DamagedImageError(f"the JPEG has more than {_MAX_SEGMENTS:,} segments before its first scan")
    if frame is None or marker == _END_OF_IMAGE:
        raise DamagedImageError("damaged JPEG: it has no frame, or no scan")
    height, width, components = _frame(frame)
    in_scan = data[position + 4]
    several_scans = kind == _PROGRESSIVE or in_scan < len(components)
    blocks = sum(component.blocks for component in components)
    seconds = 64e-9 * blocks + 10e-9 * len(data) + 100e-9 * tables  # which Pillow reads in Python
    if several_scans:
        seconds += 10e-9 * len(data) + _scan_seconds(data, components)
    if kind not in _HUFFMAN:  # arithmetic coding, or lossless
        seconds += 64 * 200e-9 * blocks
    turned = orientation(exif) or 1
    return JpegHeader(
        "JPEG",
        width,
        height,
        Cost(0, 0),
        orientation=turned,
        components=len(components),
        plain=plain,
        entropy_seconds=seconds,
        coefficients=128 * blocks if several_scans else 0,
    )


def without_notes(data: bytes) -> bytes:
    """The file without what Pillow would read in Python, however much it is, and needs for no pixel."""
    return _NOTES.sub(rb"\1none", data)


def _frame(frame: bytes) -> tuple[int, int, list[_Component]]:
    """Height, width and components (section B.2.2)."""
    _, height, width, count = struct.unpack_from(">BHHB", frame)
    sampling = [(frame[6 + 3 * i], frame[7 + 3 * i] >> 4, frame[7 + 3 * i] & 15) for i in range(count)]
    if not 1 <= count <= 4 or any(not (1 <= h <= 4 and 1 <= v <= 4) for _, h, v in sampling):
        raise DamagedImageError("damaged JPEG: its frame has no such components")
    across = math.ceil(width / (8 * max(h for _, h, _ in sampling)))
    down = math.ceil(height / (8 * max(v for _, _, v in sampling)))
    return height, width, [_Component(number, across * h * down * v) for number, h, v in sampling]


def _scan_seconds(data: bytes, components: list[_Component]) -> float:
    """Time of all scans, beside that for the bytes in them.

    Whatever looks like the beginning of a scan is taken for one, so that none can hide.
    """
    blocks: dict[int, int] = {}
    for component in components:
        blocks[component.number] = max(component.blocks, blocks.get(component.number, 0))
    seconds = 0.0
    position = -1
    for _ in range(_MAX_SCANS):
        position = data.find(_SCAN, position + 1)
        if position < 0:
            return seconds
        numbers, parameters = _scan(data, position)
        if len(parameters) < 3:
            return seconds
        first, last, approximation = parameters
        # A scan that refines looks at each coefficient of its band, even of blocks that it leaves alone.
        band = max(0, min(last, 63) - first + 1) if approximation >> 4 else 0
        scanned = sum(blocks.get(number, 0) for number in numbers)
        seconds += 5e-6 + (10e-9 + 1e-9 * band) * scanned
    raise DamagedImageError(f"the JPEG has more than {_MAX_SCANS:,} scans")


def _scan(data: bytes, position: int) -> tuple[bytes, bytes]:
    """The components in the scan that begins at `position`, and its parameters (section B.2.3)."""
    count = min(data[position + 4], 4) if position + 4 < len(data) else 0
    behind = position + 5 + 2 * count
    return data[position + 5 : behind : 2], data[behind : behind + 3]
