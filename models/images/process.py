"""What a process sets once that decodes nothing but files from strangers."""

from __future__ import annotations

import ctypes
import logging
import warnings
from contextlib import suppress
from typing import Any, Final

import cv2
from PIL import AvifImagePlugin, Image, _imaging

_M_MMAP_THRESHOLD: Final = -3  # of mallopt(3)
_MAPPED_BYTES: Final = 4 << 20


def configure_decoders() -> None:
    """Set what the decoders keep for a whole process."""
    Image.MAX_IMAGE_PIXELS = None  # what the headers foretell is the limit
    # What they say about damaged files would let anyone fill the log, and Python remembers each warning.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the server has threads enough
    with suppress(ImportError):  # the extra `heif`
        import pillow_heif

        pillow_heif.options.DECODE_THREADS = 1
    # JetPack 6's OpenCV 4.11 has the function elsewhere.
    logs: Any = cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2
    logs.setLogLevel(0)  # silent
    with suppress(OSError, AttributeError):  # Pillow was built without libtiff
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    # glibc raises this threshold by itself, and then keeps up to 64 MiB of each thread's images for good.
    with suppress(OSError, AttributeError, TypeError):  # another C library, or system
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
