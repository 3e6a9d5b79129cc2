"""The formats of image files: which one a file is of, and what its header says."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Final, NoReturn

from PIL import features

from models.images import bmp, gif, heif, jpeg, png, tiff, webp
from models.images.errors import DamagedImageError, UnsupportedImageError
from models.images.header import Header

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")
MEDIA_TYPES: Final = frozenset(
    {"image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/x-ms-bmp", "image/tiff"}
    | {"image/heic", "image/heif", "image/avif"}
)

_READERS: Final[dict[str, Callable[[bytes], Header]]] = {
    "JPEG": jpeg.read,
    "PNG": png.read,
    "WEBP": webp.read,
    "GIF": gif.read,
    "BMP": bmp.read,
    "TIFF": tiff.read,
    "HEIF": heif.read_heif,
    "AVIF": heif.read_avif,
}
# ISO media files, by their major brands (ISO/IEC 23008-12, AVIF); of `_BOTH` the other brands decide.
_HEIC: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_AVIF: Final = (b"avif", b"avis")
_BOTH: Final = (b"mif1", b"msf1")
_MAX_BRANDS: Final = 256  # bytes of them
# Formats that people do send, told from damaged files by their first bytes (offset, magic).
_UNSUPPORTED: Final = {
    "JPEG XL": (0, b"\xff\x0a"),
    "JPEG XL file": (4, b"JXL \r\n"),
    "JPEG 2000": (4, b"jP  \r\n"),
    "Photoshop file": (0, b"8BPS"),
    "Windows icon": (0, b"\0\0\1\0"),
    "PDF": (0, b"%PDF-"),
}


def read_header(data: bytes, formats: Collection[str] = FORMATS) -> Header:
    """What the header of an image file says. The bytes alone decide which format it is of.

    It takes at most 50 ms, whatever `data` is, and no more memory than a few tags.

    Args:
        data: the file.
        formats: those of `FORMATS` to accept.

    Raises:
        DamagedImageError: not an image, or its header is truncated, corrupt or too long.
        UnsupportedImageError: not one of `formats`, of an unusual kind, or its decoder is not installed.
    """
    name = _format_of(data)
    if name is None:
        _refuse(data, formats)
    if name not in formats:
        accepted = _listed(formats)
        raise UnsupportedImageError(f"{name} images are not accepted; convert it to one of {accepted}")
    if missing := _missing_decoder(name):
        raise UnsupportedImageError(missing)
    try:
        return _READERS[name](data)
    except (struct.error, IndexError):
        raise DamagedImageError(f"damaged {name}: its header is truncated") from None


def _format_of(data: bytes) -> str | None:
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM":
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if data[4:8] == b"ftyp":
        return _format_of_brands(data)
    return None


def _format_of_brands(data: bytes) -> str | None:
    brand = data[8:12]
    if brand in _BOTH:
        others = data[16 : min(int.from_bytes(data[:4], "big"), _MAX_BRANDS)]
        brand = _AVIF[0] if _AVIF[0] in others else _HEIC[0]
    return "HEIF" if brand in _HEIC else "AVIF" if brand in _AVIF else None


def _missing_decoder(name: str) -> str | None:
    """What to install for a format; None: nothing."""
    if name == "HEIF" and find_spec("pillow_heif") is None:
        return "HEIC photographs need pillow-heif, which is not installed: pip install 'trimrt[heif]'"
    if name == "AVIF" and not features.check("avif"):
        return "AVIF images need a Pillow that was built with AVIF, as those from pip are; this one was not"
    return None


def _refuse(data: bytes, formats: Collection[str]) -> NoReturn:
    if kind := _unsupported_kind(data):
        raise UnsupportedImageError(f"{kind}; convert it to one of {_listed(formats)}")
    raise DamagedImageError(f"not an image of a known format ({_listed(formats)})")


def _unsupported_kind(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return "a video or another ISO media file"
    return next(
        (f"a {kind}" for kind, (at, magic) in _UNSUPPORTED.items() if data[at : at + len(magic)] == magic),
        None,
    )


def _listed(formats: Collection[str]) -> str:
    return ", ".join(name for name in FORMATS if name in formats)
