"""*The* preprocessing: an encoded image becomes `uint8` RGB pixels, the same everywhere.

Evaluation, calibration and serving all call `load_pixels`, so a model never meets pixels in
production that differ from those it was measured on. Normalisation is not done here: it is part of
every exported graph. A server, which trusts no file, first makes a `Plan` and looks at what it costs.

The libraries were chosen by measurement (`benchmarks/preprocessing.py`): libjpeg-turbo (through
simplejpeg) decodes a JPEG straight at a reduced scale, OpenCV resizes, and Pillow reads all other
formats. This module imports no torch.

Importing it leaves the settings of the process alone. A process that decodes in several threads runs fastest
if OpenCV uses one for each image: `cv2.setNumThreads(1)`, or OPENCV_FOR_THREADS_NUM=1 in the environment.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.images.decoding import Pixels, decode
from models.images.errors import (
    DamagedImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)
from models.images.formats import FORMATS, MEDIA_TYPES, read_header
from models.images.header import Cost, Header

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MEDIA_TYPES",
    "Cost",
    "DamagedImageError",
    "ImageError",
    "ImageTooLargeError",
    "Interpolation",
    "Pixels",
    "Plan",
    "Preprocessing",
    "UnsupportedImageError",
    "load_pixels",
    "plan_loading",
]

Interpolation = Literal["auto", "nearest", "bilinear", "bicubic", "lanczos", "opencv-bilinear"]

DEFAULT_MAX_PIXELS: Final = 64_000_000

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

_AREA_FROM_FACTOR: Final = 2  # below it bilinear misses no pixel, and is five times faster
_MAX_ASPECT: Final = 8  # resizing all of a 60000x1 image would take gigabytes, for a crop of its middle


class Preprocessing(BaseModel):
    """How an image becomes the network's input.

    Decode, EXIF orientation, RGB, `fit` to `height` x `width`: that much is `load_pixels`. `channels`, `mean`
    and `std` are applied inside the exported graph.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    resize: int = Field(ge=1, le=4096, description="length of the shorter side after resizing, in pixels")
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    mean: tuple[float, float, float] = Field(
        default=IMAGENET_MEAN, description="of pixels scaled to 0..1, in the order of `channels`"
    )
    std: tuple[float, float, float] = Field(default=IMAGENET_STD, description="likewise")
    scaled_decoding: bool = Field(
        default=True,
        description="let the JPEG decoder halve the image up to three times, never below `resize`",
    )
    fit: Literal["crop", "squash", "letterbox", "none"] = Field(
        default="crop",
        description="crop: the shorter side becomes `resize`, then a centre crop; squash: the longer side of "
        "the input becomes `resize` and the other as much, whatever the image's shape, then a centre crop; "
        "letterbox: all of the image fits in, the rest is `fill`; none: a centre crop of the image as it is, "
        "`fill` where it is smaller",
    )
    fill: tuple[int, int, int] = Field(default=(0, 0, 0), description="RGB colour beside the image")
    interpolation: Interpolation = Field(
        default="auto",
        description="auto is OpenCV's, the fastest; opencv-bilinear its bilinear one, which does not smooth; "
        "the others are Pillow's",
    )
    channels: Literal["RGB", "BGR", "L"] = Field(
        default="RGB", description="what the network itself takes; L is grey"
    )

    @property
    def squashed(self) -> tuple[int, int]:
        """Height and width of any image before the crop, where `fit` is squash."""
        factor = self.resize / max(self.height, self.width)
        return round(self.height * factor), round(self.width * factor)

    @model_validator(mode="before")
    @classmethod
    def _resize_of_no_crop(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("fit", "crop") == "crop" or "resize" in fields:
            return fields
        sides = [side for side in (fields.get("height"), fields.get("width")) if isinstance(side, int)]
        return {**fields, "resize": max(sides)} if sides else fields

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if self.resize < max(self.height, self.width):
            raise ValueError(f"resize {self.resize} is smaller than the crop {self.height}x{self.width}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if not all(0 <= value <= 255 for value in self.fill):
            raise ValueError(f"fill must be three values from 0 to 255, not {self.fill}")
        return self


class Plan(NamedTuple):
    """A file whose header was read and found acceptable, not yet decoded.

    Attributes:
        data: the file.
        header: what its header says.
        spec: what is to become of it.
    """

    data: bytes
    header: Header
    spec: Preprocessing

    @property
    def cost(self) -> Cost:
        """The most time and memory that `load` takes."""
        return self.header.cost(self._smallest)

    @property
    def _smallest(self) -> float:
        keeps_size = self.spec.fit == "none"
        return self.spec.resize if self.spec.scaled_decoding and not keeps_size else math.inf

    def load(self, out: Pixels | None = None) -> Pixels:
        """The network's input; see `load_pixels`."""
        image = _resize_and_crop(decode(self.data, self.header, self._smallest), self.spec)
        if out is None:
            return np.ascontiguousarray(image)
        out[:] = image
        return out


def plan_loading(
    data: bytes,
    spec: Preprocessing,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    formats: Collection[str] = FORMATS,
) -> Plan:
    """Read the header of an encoded image, without decoding anything.

    Raises:
        DamagedImageError: not an image, or its header is truncated or corrupt.
        UnsupportedImageError: an image of another format than `formats`, or of an unusual kind.
        ImageTooLargeError: more pixels than `max_pixels`.
    """
    header = read_header(data, formats)
    width, height = header.width, header.height
    if width < 1 or height < 1:
        raise DamagedImageError(f"damaged image: its size is {width}x{height}")
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"the image has {width}x{height} = {width * height:,} pixels; the limit is {max_pixels:,}"
        )
    return Plan(data, header, spec)


def load_pixels(
    data: bytes, spec: Preprocessing, *, max_pixels: int = DEFAULT_MAX_PIXELS, out: Pixels | None = None
) -> Pixels:
    """The network's input for one encoded image.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC or AVIF file. Of an animation the first frame counts,
            of transparent pixels their colour, of 16-bit channels the upper half.
        spec: sizes and decoding mode.
        max_pixels: refuse images with more pixels than this, judged by the header. Pillow's own limit, which
            is twice `PIL.Image.MAX_IMAGE_PIXELS`, holds beside it for all formats but JPEG.
        out: where to put the result, of its shape and dtype; None: in new memory.

    Returns:
        C-contiguous, writable `uint8` array of shape `(spec.height, spec.width, 3)`, RGB; `out` if given.

    Raises:
        DamagedImageError: not an image, truncated, or corrupt.
        UnsupportedImageError: an image of a format that is not accepted.
        ImageTooLargeError: more pixels than `max_pixels`, or than Pillow allows.
    """
    return plan_loading(data, spec, max_pixels=max_pixels).load(out)


def _resize_and_crop(image: Pixels, spec: Preprocessing) -> Pixels:
    if image.shape[0] == image.shape[1] == spec.height == spec.width == spec.resize:
        return image
    if spec.fit == "squash":
        return _crop(_resized(image, *spec.squashed, spec), spec.height, spec.width)
    if spec.fit == "letterbox":
        factor = min(spec.height / image.shape[0], spec.width / image.shape[1])
        height, width = (max(1, round(side * factor)) for side in image.shape[:2])
        return _crop(_padded(_resized(image, height, width, spec), spec), spec.height, spec.width)
    if spec.fit == "none":
        return _crop(_padded(image, spec), spec.height, spec.width)
    shorter = min(image.shape[:2])
    image = _crop(
        image, min(image.shape[0], _MAX_ASPECT * shorter), min(image.shape[1], _MAX_ASPECT * shorter)
    )
    # Rounded as torchvision rounds: the longer side is truncated.
    height, width = (
        spec.resize if side == shorter else int(spec.resize * side / shorter) for side in image.shape[:2]
    )
    return _crop(_resized(image, height, width, spec), spec.height, spec.width)


def _resized(image: Pixels, height: int, width: int, spec: Preprocessing) -> Pixels:
    if image.shape[:2] == (height, width):
        return image
    if spec.interpolation == "opencv-bilinear":
        return cv2.resize(image, (width, height)).astype(np.uint8, copy=False)
    if spec.interpolation != "auto":
        how = Image.Resampling[spec.interpolation.upper()]
        return np.array(Image.fromarray(image).resize((width, height), how))  # Pillow's memory is read-only
    ratios = image.shape[0] / height, image.shape[1] / width
    factor = max(ratios) if spec.fit == "squash" else min(ratios)  # else they differ by rounding alone
    fast = cv2.INTER_AREA if factor > _AREA_FROM_FACTOR else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=fast).astype(np.uint8, copy=False)


def _padded(image: Pixels, spec: Preprocessing) -> Pixels:
    """`image` in the middle of a canvas of `spec.fill`, as large as the input where it is smaller."""
    height, width = image.shape[:2]
    if height >= spec.height and width >= spec.width:
        return image
    canvas = np.full((max(height, spec.height), max(width, spec.width), 3), spec.fill, np.uint8)
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def _crop(image: Pixels, height: int, width: int) -> Pixels:
    """The middle of `image`, placed as torchvision's `CenterCrop` places it."""
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
