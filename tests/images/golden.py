"""Images of every kind that the server takes, and what its preprocessing makes of them.

`write_images` runs here. The file itself runs inside an image, `python3 golden.py FOLDER`, and prints the
SHA-256 of each image's tensor: every library that stands between bytes and pixels has then done its work.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from models.preprocessing import Preprocessing, load_pixels

SPEC: Final = Preprocessing(resize=72, height=64, width=64)
# name: (size, mode, how Pillow saves it)
_IMAGES: Final[dict[str, tuple[tuple[int, int], str, dict[str, Any]]]] = {
    "photo.jpg": ((640, 427), "RGB", {"quality": 90}),
    "progressive.jpg": ((500, 333), "RGB", {"quality": 80, "progressive": True}),
    "turned.jpg": ((320, 200), "RGB", {"quality": 90, "exif": 6}),
    "print.jpg": ((200, 150), "CMYK", {"quality": 90}),
    "small.png": ((40, 30), "RGB", {}),
    "grey.png": ((128, 128), "L", {}),
    "deep.png": ((100, 80), "I;16", {}),
    "palette.gif": ((150, 100), "P", {}),
    "lossy.webp": ((300, 260), "RGB", {"quality": 80}),
    "clear.webp": ((96, 96), "RGBA", {"lossless": True}),
    "plain.bmp": ((90, 70), "RGB", {}),
    "packed.tiff": ((120, 90), "RGB", {"compression": "tiff_lzw"}),
}


def write_images(folder: Path) -> None:
    """One image of each kind, the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, ((width, height), mode, options) in _IMAGES.items():
        blocks = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        image = blocks.resize((width, height), Image.Resampling.BICUBIC)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        if "exif" in options:
            exif = Image.Exif()
            exif[0x0112] = options["exif"]
            options = {**options, "exif": exif.tobytes()}
        image.save(folder / name, **options)


def tensors(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensor that the preprocessing makes of every image in `folder`."""
    return {
        path.name: hashlib.sha256(load_pixels(path.read_bytes(), SPEC).tobytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


if __name__ == "__main__":
    print(json.dumps(tensors(Path(sys.argv[1]))))
