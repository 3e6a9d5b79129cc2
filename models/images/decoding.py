"""Encoded images to upright RGB pixels.

libjpeg-turbo (through simplejpeg) decodes a JPEG straight at a reduced scale. OpenCV decodes WebP, for which
Pillow keeps the interpreter's lock and takes three times the memory, and run-length bitmaps, for which Pillow
has no compiled code. Small and plain PNGs take it a fifth of Pillow's time; with others libpng could write of
faults to standard error. pillow-heif (the extra `heif`) decodes HEIC: as a part of Pillow it takes twice the
memory. Pillow reads the rest.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any, Final

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.images.bmp import BmpHeader
from models.images.errors import DamagedImageError, ImageError, ImageTooLargeError, UnsupportedImageError
from models.images.header import Header
from models.images.jpeg import JpegHeader, without_notes
from models.images.metadata import orientation
from models.images.png import PngHeader
from models.images.tiff import TiffHeader
from models.images.webp import WebpHeader

Pixels = NDArray[np.uint8]

# Pillow converts and copies holding the interpreter's lock: with 500,000 pixels it does for 3 ms.
_STRIP_PIXELS: Final = 500_000
# libjpeg-turbo's simple interface refuses what libjpeg itself reads.
_READ_BY_PILLOW: Final = re.compile("extraneous bytes before marker|subsampling")
_SECOND_TRY_SECONDS: Final = 0.25

# Pillow refuses or warns by a limit of the whole process, PIL.Image.MAX_IMAGE_PIXELS.
_PILLOWS_LIMIT: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode(data: bytes, header: Header, smallest: float = math.inf) -> Pixels:
    """The pixels of an image, upright.

    Args:
        data: the file.
        header: what `read_header` found in it.
        smallest: a JPEG is halved, up to three times, while its shorter side keeps that many pixels.

    Returns:
        `uint8` array of shape `(height, width, 3)`, RGB.

    Raises:
        DamagedImageError: truncated or corrupt.
        UnsupportedImageError: of a kind that is not accepted.
        ImageTooLargeError: more pixels than Pillow allows.
    """
    if isinstance(header, JpegHeader):
        return _decode_jpeg(data, header, smallest)
    if isinstance(header, WebpHeader) and not header.animated:
        return _decode_with_opencv(data, header, header.orientation)
    if isinstance(header, PngHeader) and header.plain and header.is_sound(data):
        return _decode_with_opencv(data, header)
    if isinstance(header, BmpHeader) and header.run_length:
        return _decode_run_length(data, header)
    if isinstance(header, TiffHeader):
        return _decode_tiff(data, header)
    if header.format == "HEIF":
        return _decode_heif(data)
    return _decode_with_pillow(data, header)


def _decode_run_length(data: bytes, header: BmpHeader) -> Pixels:
    try:
        return _decode_with_opencv(data, header)
    except DamagedImageError:
        if not header.second_try:
            raise
    return _decode_with_pillow(data, header)


def _decode_with_opencv(data: bytes, header: Header, turned: int = 1) -> Pixels:
    how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    except cv2.error:  # a side is longer than OpenCV allows, or the header's format is not what it is
        image = None
    if image is None:
        raise DamagedImageError(f"damaged {header.format}, or of a kind that is not supported")
    return _upright(image.astype(np.uint8, copy=False), turned)


def _decode_tiff(data: bytes, header: TiffHeader) -> Pixels:
    if header.black_is_zero is None:
        return _decode_with_pillow(data, header, bits=header.bits)
    place, value = header.black_is_zero
    negative = data[:place] + value + data[place + len(value) :]
    pixels = _decode_with_pillow(negative, header, bits=header.bits)
    return np.bitwise_not(pixels, out=pixels)


def _unidentified(data: bytes, header: Header) -> ImageError:
    """Why Pillow does not know a file whose header could be read."""
    if not isinstance(header, TiffHeader):
        return DamagedImageError(f"damaged {header.format}, or of a kind that is not supported")
    order = "little-endian" if data[:2] == b"II" else "big-endian"
    channels = f"{header.samples} channel{'s' * (header.samples != 1)} of {header.bits} bits"
    return UnsupportedImageError(
        f"{order} TIFFs of this kind ({channels}) are not supported; convert it to 8 or 16 bits a channel"
    )


def _decode_jpeg(data: bytes, header: JpegHeader, smallest: float) -> Pixels:
    divisor = header.divisor(smallest)
    if header.components == 4 or not header.plain:
        return _decode_with_pillow(without_notes(data), header, divisor)
    try:
        image: Pixels = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=math.ceil(header.height / divisor),
            min_width=math.ceil(header.width / divisor),
        )
    except ValueError as error:
        if _READ_BY_PILLOW.search(str(error)) and header.cost(smallest).seconds < _SECOND_TRY_SECONDS:
            return _decode_with_pillow(without_notes(data), header, divisor)
        raise DamagedImageError(f"damaged JPEG: {error}") from error
    return _upright(image, header.orientation)


def _decode_heif(data: bytes) -> Pixels:
    import pillow_heif

    try:
        file = pillow_heif.open_heif(data)
        samples: NDArray[Any] = np.asarray(file[file.primary_index])  # upright, and cropped
    except Exception as error:  # libheif tells of hostile files in several types
        raise DamagedImageError(f"damaged HEIF: {error}") from error
    if samples.dtype != np.uint8:  # grey of more bits
        samples = (samples >> 8).astype(np.uint8)
    if samples.ndim == 2:
        samples = samples[:, :, None]
    if samples.shape[2] < 3:  # grey, maybe with transparency
        return np.repeat(samples[:, :, :1], 3, axis=2)
    return np.array(samples[:, :, :3])  # a copy, for libheif's own memory is read-only


def _decode_with_pillow(data: bytes, header: Header, divisor: int = 1, bits: int = 16) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
            if divisor > 1:
                image.draft("RGB", (math.ceil(header.width / divisor), math.ceil(header.height / divisor)))
            image.load()
            pixels = _rgb(image, bits)
            turned = header.orientation if isinstance(header, JpegHeader) else _orientation(image)
    except UnsupportedImageError:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data, header) from None
    except _PILLOWS_LIMIT as error:
        raise ImageTooLargeError(f"Pillow refuses the image: {error}") from error
    except Exception as error:  # Pillow's readers raise many types on hostile files
        raise DamagedImageError(f"damaged {header.format}: {error}") from error
    return _upright(pixels, turned)


def _rgb(image: Image.Image, bits: int) -> Pixels:
    """All pixels of `image`, whose grey samples have `bits`, converted a strip at a time."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if rows >= height:
        return _strip_to_rgb(image, bits)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, width, bottom)), bits)
    return pixels


def _strip_to_rgb(image: Image.Image, bits: int) -> Pixels:
    if image.mode in ("F", "I"):
        raise UnsupportedImageError("32-bit images are not supported; convert it to 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))  # a copy, for Pillow's own memory is read-only


def _orientation(image: Image.Image) -> int:
    """What `image.getexif` says of it, without reading all other tags; 1 if it says nothing."""
    if image.format == "TIFF":
        return 1  # Pillow has turned it already
    exif, profile = image.info.get("exif"), image.info.get("Raw profile type exif")
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")
    try:
        if exif is None and profile is not None:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        return orientation(exif, xmp.encode() if isinstance(xmp, str) else xmp) or 1
    except Exception:  # broken metadata are no reason to refuse the pixels
        return 1


def _upright(image: Pixels, turned: int) -> Pixels:
    """`image` turned upright, by the EXIF orientation 1 to 8 (EXIF 2.32, section 4.6.4)."""
    if turned in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if turned in (2, 3, 6, 7):
        image = image[:, ::-1]
    if turned in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
