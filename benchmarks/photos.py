"""scikit-learn's two sample photographs (640x427) as JPEG files, as they are or at other sizes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
from PIL import Image
from sklearn.datasets import load_sample_image

NAMES = ("china.jpg", "flower.jpg")


@lru_cache
def photographs(megapixels: float | None = None) -> tuple[bytes, ...]:
    """Both photographs as JPEG files of quality 90.

    Args:
        megapixels: resize them to this many million pixels; None leaves them at 640x427 (0.27).
    """
    files = []
    for name in NAMES:
        pixels = load_sample_image(name)
        if megapixels is not None:
            scale = math.sqrt(megapixels * 1e6 / (pixels.shape[0] * pixels.shape[1]))
            size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return tuple(files)


def store(name: str, files: Sequence[bytes], folder: Path) -> list[Path]:
    """Write `files` into `folder`, for programs that read files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name.replace(' ', '')}-{index}.jpg" for index in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    return paths
