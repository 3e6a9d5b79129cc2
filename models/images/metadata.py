"""The orientation that EXIF data or an XMP packet tell, without reading all that they hold."""

from __future__ import annotations

import re
import struct
from typing import Final

from models.images.directory import Directories

_ORIENTATION: Final = 0x0112  # CIPA DC-008, section 4.6.4
_MAX_TAGS: Final = 1000
_PREFIX: Final = re.compile(rb"(?:Exif\0\0){0,3}")
_XMP_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_MAX_XMP: Final = 1 << 20


def orientation(exif: bytes | None, xmp: bytes | None = None) -> int | None:
    """The orientation, 1 to 8 unless it is wrong; None: there is none, or the metadata are damaged.

    Args:
        exif: counts if it has one.
        xmp: counts otherwise, unless it is longer than one MiB.
    """
    found = None if exif is None else _in_exif(exif)
    if found is None and xmp and len(xmp) <= _MAX_XMP:
        match = _XMP_ORIENTATION.search(xmp)
        return int(match[1]) if match else None
    return found


def _in_exif(exif: bytes) -> int | None:
    prefix = _PREFIX.match(exif)
    assert prefix is not None
    try:
        directories = Directories(exif[prefix.end() :])
        for tag in directories.tags(directories.first, _MAX_TAGS):
            if tag.number == _ORIENTATION:
                return next(iter(directories.integers(tag, 1)), None)
    except (ValueError, struct.error):
        pass  # the pixels are fine, so broken EXIF is no reason to refuse them
    return None
