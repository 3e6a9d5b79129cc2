"""*The* preprocessing: an encoded image becomes `uint8` RGB pixels, the same everywhere.

Evaluation, calibration and serving all call `load_pixels`, so a model never meets pixels in
production that differ from those it was measured on. Normalisation is not done here: it is part of
every exported graph.

The libraries were chosen by measurement (`benchmarks/preprocessing.py`): libjpeg-turbo (through
simplejpeg) decodes a JPEG straight at a reduced scale, OpenCV resizes, and Pillow reads all other
formats. This module imports no torch.

Importing it leaves the settings of the process alone. A process that decodes in several threads runs fastest
if OpenCV uses one for each image: `cv2.setNumThreads(1)`, or OPENCV_FOR_THREADS_NUM=1 in the environment.
"""

from __future__ import annotations

import io
import math
from typing import ClassVar, Final

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.errors import TrimRTError

Pixels = NDArray[np.uint8]

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MEDIA_TYPES: Final = frozenset(
    {"image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/x-ms-bmp", "image/tiff"}
)
DEFAULT_MAX_PIXELS: Final = 64_000_000

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

_ORIENTATION_TAG: Final = 0x0112
_APP1: Final = 0xE1  # JPEG markers (ITU-T T.81, table B.1)
_START_OF_SCAN: Final = 0xDA
_END_OF_IMAGE: Final = 0xD9
_AREA_FROM_FACTOR: Final = 2  # below it bilinear misses no pixel, and is five times faster
_JPEG_DIVISORS: Final = (8, 4, 2)  # libjpeg-turbo's vector code; other eighths take longer than no shrinking

_MAX_ASPECT: Final = 8  # resizing all of a 60000x1 image would take gigabytes, for a crop of its middle
# Formats that people do send, told from damaged files by their first bytes (offset, magic).
_UNSUPPORTED: Final = {
    "HEIC, AVIF or another ISO media file": (4, b"ftyp"),
    "JPEG XL": (0, b"\xff\x0a"),
    "JPEG XL file": (4, b"JXL \r\n"),
    "JPEG 2000": (4, b"jP  \r\n"),
    "Photoshop file": (0, b"8BPS"),
    "Windows icon": (0, b"\0\0\1\0"),
    "PDF": (0, b"%PDF-"),
}

# Pillow refuses or warns by a limit of the whole process, PIL.Image.MAX_IMAGE_PIXELS.
_PILLOWS_LIMIT: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(TrimRTError):
    """The bytes cannot be turned into pixels; the message says why and is safe to show a client."""

    problem: ClassVar[str] = "image-damaged"


class DamagedImageError(ImageError):
    """Not an image, or a truncated or corrupt one."""


class UnsupportedImageError(ImageError):
    """An image, but of a format or kind that is not accepted."""

    problem = "unsupported-media-type"


class ImageTooLargeError(ImageError):
    """The image has more pixels than the limit allows."""

    problem = "image-too-large"


class Preprocessing(BaseModel):
    """How an image becomes the network's input.

    Decode, EXIF orientation, RGB, resize so that the shorter side is `resize` pixels, centre crop
    to `height` x `width`: that much is `load_pixels`. `mean` and `std` (of pixels scaled to 0..1,
    per RGB channel) are applied inside the exported graph.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: int = Field(ge=1, le=4096, description="length of the shorter side after resizing, in pixels")
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    scaled_decoding: bool = Field(
        default=True,
        description="let the JPEG decoder halve the image up to three times, never below `resize`",
    )

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if self.resize < max(self.height, self.width):
            raise ValueError(f"resize {self.resize} is smaller than the crop {self.height}x{self.width}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        return self


def load_pixels(
    data: bytes, spec: Preprocessing, *, max_pixels: int = DEFAULT_MAX_PIXELS, out: Pixels | None = None
) -> Pixels:
    """The network's input for one encoded image.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP or TIFF file. Of an animation the first frame counts, of
            transparent pixels their colour, of 16-bit channels the upper half.
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
    if data[:3] == b"\xff\xd8\xff":
        image = decode_jpeg(data, spec.resize if spec.scaled_decoding else math.inf, max_pixels)
    else:
        image = _decode_with_pillow(data, max_pixels)
    image = _resize_and_crop(image, spec)
    if out is None:
        return np.ascontiguousarray(image)
    out[:] = image
    return out


def decode_jpeg(data: bytes, smallest: float, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """A JPEG upright, halved while its shorter side stays at least `smallest` pixels, and up to three times.

    Returns:
        `uint8` array of shape `(height, width, 3)`, RGB.

    Raises:
        DamagedImageError: truncated or corrupt.
        ImageTooLargeError: more than `max_pixels` pixels.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DamagedImageError(f"damaged JPEG: {error}") from error
    _check_size(width, height, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return _decode_with_pillow(data, max_pixels)
    shorter = min(height, width)
    divisor = next((number for number in _JPEG_DIVISORS if math.ceil(shorter / number) >= smallest), 1)
    try:
        image: Pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=math.ceil(height / divisor), min_width=math.ceil(width / divisor)
        )
    except ValueError as error:
        raise DamagedImageError(f"damaged JPEG: {error}") from error
    return _orient(image, _jpeg_orientation(data))


def _jpeg_orientation(data: bytes) -> int:
    exif = _jpeg_exif(data)
    if exif is None:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        return int(tags.get(_ORIENTATION_TAG, 1))
    except Exception:  # the pixels are fine, so broken EXIF is no reason to refuse them
        return 1


def _jpeg_exif(data: bytes) -> bytes | None:
    """The EXIF segment (CIPA DC-008, section 4.7.2) among those before the picture itself."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, body = data[position + 1], position + 4
        end = position + 2 + int.from_bytes(data[position + 2 : body], "big")
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
        if marker == _APP1 and data[body : body + 6] == b"Exif\0\0":
            return data[body:end]
        # A marker may be preceded by any number of fill bytes (ITU-T T.81, section B.1.1.2).
        position = position + 1 if marker == 0xFF else end
    return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow raises struct.error, SyntaxError and others on malformed EXIF
        return 1


def _orient(image: Pixels, orientation: int) -> Pixels:
    """`image` turned upright, by the EXIF orientation 1 to 8 (EXIF 2.32, section 4.6.4)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _decode_with_pillow(data: bytes, max_pixels: int) -> Pixels:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        accepted = ", ".join(FORMATS)
        for kind, (offset, magic) in _UNSUPPORTED.items():
            if data[offset : offset + len(magic)] == magic:
                raise UnsupportedImageError(f"a {kind}; convert it to one of {accepted}") from error
        raise DamagedImageError(f"not an image of a known format ({accepted})") from error
    except _PILLOWS_LIMIT as error:
        raise ImageTooLargeError(f"Pillow refuses the image: {error}") from error
    except Exception as error:  # Pillow's readers raise many types on hostile headers
        raise DamagedImageError(f"damaged image: {error}") from error
    with image:
        _check_size(image.width, image.height, max_pixels)
        try:
            pixels = _rgb(image)
            orientation = _orientation(image)
        except UnsupportedImageError:
            raise
        except _PILLOWS_LIMIT as error:
            raise ImageTooLargeError(f"Pillow refuses the image: {error}") from error
        except Exception as error:
            raise DamagedImageError(f"damaged {image.format}: {error}") from error
    return _orient(pixels, orientation)


def _rgb(image: Image.Image) -> Pixels:
    if image.mode in ("F", "I"):
        raise UnsupportedImageError("32-bit images are not supported; convert it to 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))  # a copy, for Pillow's own memory is read-only


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DamagedImageError(f"damaged image: its size is {width}x{height}")
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"the image has {width}x{height} = {width * height:,} pixels; the limit is {max_pixels:,}"
        )


def _resize_and_crop(image: Pixels, spec: Preprocessing) -> Pixels:
    shorter = min(image.shape[:2])
    image = _crop(
        image, min(image.shape[0], _MAX_ASPECT * shorter), min(image.shape[1], _MAX_ASPECT * shorter)
    )
    height, width = image.shape[:2]
    if shorter != spec.resize:
        factor = shorter / spec.resize
        # Rounded as torchvision rounds: the longer side is truncated.
        height, width = (
            spec.resize if side == shorter else int(spec.resize * side / shorter) for side in (height, width)
        )
        how = cv2.INTER_AREA if factor > _AREA_FROM_FACTOR else cv2.INTER_LINEAR
        image = cv2.resize(image, (width, height), interpolation=how).astype(np.uint8, copy=False)
    return _crop(image, spec.height, spec.width)


def _crop(image: Pixels, height: int, width: int) -> Pixels:
    """The middle of `image`, placed as torchvision's `CenterCrop` places it."""
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
