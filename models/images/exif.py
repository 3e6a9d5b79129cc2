"""The orientation that EXIF data tell (CIPA DC-008, section 4.6.4), without reading all that they hold."""

from __future__ import annotations

import struct
from typing import Final

from models.images.directory import Directories

_ORIENTATION: Final = 0x0112
_MAX_TAGS: Final = 1000
_PREFIX: Final = b"Exif\0\0"


def orientation(exif: bytes) -> int | None:
    """The orientation, 1 to 8 unless it is wrong; None: there is none, or the data are damaged."""
    while exif.startswith(_PREFIX):
        exif = exif[len(_PREFIX) :]
    try:
        directories = Directories(exif)
        for tag in directories.tags(directories.first, _MAX_TAGS):
            if tag.number == _ORIENTATION:
                return next(iter(directories.integers(tag, 1)), None)
    except (ValueError, struct.error):
        pass  # the pixels are fine, so broken EXIF is no reason to refuse them
    return None
