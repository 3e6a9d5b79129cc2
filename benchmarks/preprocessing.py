"""Which library should decode and resize? Milliseconds an image, one thread, measured in turn.

Run `python -m benchmarks.preprocessing`. The photograph is scikit-learn's `china.jpg` (640x427), also
enlarged to 10 megapixels; the result is what ImageNet networks take: shorter side 256, centre crop 224.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image

from builder.compile.measurement import time_in_turns
from models.preprocessing import Pixels, Preprocessing, load_pixels

SPEC = Preprocessing(resize=256, height=224, width=224)
EXACT = SPEC.model_copy(update={"scaled_decoding": False})


def with_pillow(data: bytes, *, draft: bool = False) -> Pixels:
    """Pillow alone, as most services do it."""
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft("RGB", (SPEC.resize, SPEC.resize))
    scale = SPEC.resize / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return _crop(np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR)))


def with_opencv(data: bytes) -> Pixels:
    """OpenCV alone."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError("OpenCV cannot decode this image")
    scale = SPEC.resize / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return _crop(np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8))


def _crop(image: Pixels) -> Pixels:
    top, left = (image.shape[0] - SPEC.height) // 2, (image.shape[1] - SPEC.width) // 2
    return np.ascontiguousarray(image[top : top + SPEC.height, left : left + SPEC.width])


CONTENDERS: dict[str, Callable[[bytes], Pixels]] = {
    "Pillow": with_pillow,
    "Pillow, draft mode": lambda data: with_pillow(data, draft=True),
    "OpenCV": with_opencv,
    "TrimRT, exact decoding": lambda data: load_pixels(data, EXACT),
    "TrimRT": lambda data: load_pixels(data, SPEC),
}


def milliseconds(data: bytes, repeats: int) -> dict[str, float]:
    """Median time of each contender."""
    times = time_in_turns([partial(decode, data) for decode in CONTENDERS.values()], rounds=repeats)
    return {name: float(np.median(taken)) for name, taken in zip(CONTENDERS, times, strict=True)}


def main() -> None:
    """Print the table."""
    cv2.setNumThreads(1)
    photo = load_sample_image("china.jpg")
    large = cv2.resize(photo, (3872, 2583), interpolation=cv2.INTER_CUBIC)
    table = Table("library", title="decode, resize, crop: ms an image, one thread")
    columns = []
    for title, image, repeats in (("640x427", photo, 60), ("10 megapixels", large, 10)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        columns.append(milliseconds(file.getvalue(), repeats))
        exact = CONTENDERS["TrimRT, exact decoding"](file.getvalue()).astype(int)
        difference = np.abs(CONTENDERS["TrimRT"](file.getvalue()) - exact).mean()
        table.add_column(title, justify="right")
        table.caption = f"{table.caption or ''}{title}: scaled decoding differs by {difference:.2f} of 255. "
    for name in CONTENDERS:
        table.add_row(name, *(f"{column[name]:.2f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
