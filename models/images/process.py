"""What a process sets once that decodes nothing but files from strangers."""

from __future__ import annotations

import ctypes
import logging
import warnings
from contextlib import suppress
from typing import Any

import cv2
from PIL import AvifImagePlugin, Image, _imaging


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
    silence_opencv()
    with suppress(OSError, AttributeError):  # Pillow was built without libtiff
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def silence_opencv() -> None:
    """Let OpenCV say nothing of damaged files on standard error."""
    # JetPack 6's OpenCV 4.11 has the function elsewhere.
    logs: Any = cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2
    logs.setLogLevel(0)  # silent
