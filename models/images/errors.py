"""Why an image file gives no pixels."""

from __future__ import annotations

from typing import ClassVar

from models.errors import TrimRTError


class ImageError(TrimRTError):
    """The bytes cannot be turned into pixels; the message says why and is safe to show a client."""

    problem: ClassVar[str] = "image-damaged"


class DamagedImageError(ImageError):
    """Not an image, or a truncated or corrupt one."""


class UnsupportedImageError(ImageError):
    """An image, but of a format or kind that is not accepted."""

    problem = "unsupported-media-type"


class ImageTooLargeError(ImageError):
    """The image has more pixels than the limit allows, or takes too much time or memory to decode."""

    problem = "image-too-large"
