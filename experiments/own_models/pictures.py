"""Pictures for networks from elsewhere: what Python packages ship as samples, and what is drawn here.

Folders named after classes hold pictures of these classes; a folder of pictures alone is unsorted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Besides scikit-learn, matplotlib and PyTorch, which are installed for the tests.
PACKAGES: Final = (
    "scikit-image==0.26.0",
    "gradio==6.31.0",
    "ultralytics==8.4.190",
    "floorplan-epc-detector==2.0.5",
)
SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp")
_CROPS: Final = 48
_PAGES: Final = 24
_LINES: Final = 60
_SMALLEST: Final = 200  # pixels; icons and logos are no photographs


def make(name: str, packages: Path, folder: Path) -> None:
    """Make a set of pictures.

    Args:
        name: of `SETS`.
        packages: where the packages are unpacked.
        folder: that is made, once all of it is there.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    for path, picture in SETS[name](packages, random.Random(5)):
        target = unfinished / path
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, quality=92)
    unfinished.rename(folder)


def find(folder: Path) -> list[Path]:
    """The pictures below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _installed(package: str, inner: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, f"{package} is installed for the tests"
    return Path(next(iter(spec.submodule_search_locations or []))) / inner


def _photographs(packages: Path) -> list[tuple[str, Image.Image]]:
    folders = [
        packages / "skimage/data",
        packages / "gradio/media_assets/images",
        packages / "ultralytics/assets",
        packages / "floorplan_epc_detector/samclip/images",
        _installed("sklearn", "datasets/images"),
        _installed("matplotlib", "mpl-data/sample_data"),
    ]
    pictures = [(path.stem, Image.open(path).convert("RGB")) for folder in folders for path in find(folder)]
    return [(name, picture) for name, picture in pictures if min(picture.size) >= _SMALLEST]


def _photos(packages: Path, chance: random.Random) -> Iterator[tuple[str, Image.Image]]:
    """Whole photographs, then parts of them; each a JPEG as cameras write it."""
    whole = _photographs(packages)
    for name, picture in whole:
        yield f"{name}.jpg", picture
    for number in range(_CROPS):
        _, picture = chance.choice(whole)
        width, height = (int(side * chance.uniform(0.5, 0.95)) for side in picture.size)
        left, top = chance.randint(0, picture.width - width), chance.randint(0, picture.height - height)
        yield f"part{number:03}.jpg", picture.crop((left, top, left + width, top + height))


def _font(chance: random.Random, size: int) -> ImageFont.FreeTypeFont:
    fonts = sorted(_installed("matplotlib", "mpl-data/fonts/ttf").glob("DejaVu*.ttf"))
    fonts = [font for font in fonts if "Display" not in font.name]  # has no letters
    return ImageFont.truetype(str(chance.choice(fonts)), size)


def _words() -> list[str]:
    return _installed("matplotlib", "mpl-data/matplotlibrc").read_text(encoding="utf-8").split()


def _page(chance: random.Random) -> Image.Image:
    size = chance.choice([(480, 640), (600, 800), (700, 500)])
    page = Image.new("RGB", size, tuple(chance.randint(225, 255) for _ in range(3)))
    draw, font, words = ImageDraw.Draw(page), _font(chance, chance.randint(18, 34)), _words()
    top = 15.0
    while top < page.height - 40:
        line = ""
        while draw.textlength(line, font=font) < page.width - 120:
            line += f"{chance.choice(words)} "
        draw.text((20, top), line, fill=(chance.randint(0, 60),) * 3, font=font)
        top += font.size * 1.4
    return page


def _turned(angles: tuple[int, ...]) -> Callable[[Path, random.Random], Iterator[tuple[str, Image.Image]]]:
    def pages(_packages: Path, chance: random.Random) -> Iterator[tuple[str, Image.Image]]:
        for number in range(_PAGES):
            page = _page(chance)
            for angle in angles:
                yield f"{angle}/page{number:02}.jpg", page.rotate(-angle, expand=True)

    return pages


def _lines(_packages: Path, chance: random.Random) -> Iterator[tuple[str, Image.Image]]:
    """Lines of text that are at least four times as wide as high, upright and upside down."""
    words = _words()
    for number in range(_LINES):
        font = _font(chance, chance.randint(24, 44))
        text = " ".join(chance.choice(words) for _ in range(chance.randint(3, 5)))
        width = int(font.getlength(text)) + 20
        height = int(font.size * 1.5)
        paper = tuple(chance.randint(200, 255) for _ in range(3))
        line = Image.new("RGB", (max(width, 4 * height), height), paper)
        ink = tuple(chance.randint(0, 90) for _ in range(3))
        ImageDraw.Draw(line).text((10, font.size * 0.15), text, fill=ink, font=font)
        for angle in (0, 180):
            yield f"{angle}/line{number:03}.png", line.rotate(angle)


def _faces(packages: Path, _chance: random.Random) -> Iterator[tuple[str, Image.Image]]:
    """A hundred faces of 25x25 pixels, and their mirror images."""
    faces = np.load(packages / "skimage/data/lfw_subset.npy")[:100]
    for number, face in enumerate(faces):
        picture = Image.fromarray(np.uint8(255 * face)).resize((128, 128), Image.Resampling.BICUBIC)
        yield f"face{number:02}.png", picture
        yield f"mirrored{number:02}.png", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _digits(_packages: Path, _chance: random.Random) -> Iterator[tuple[str, Image.Image]]:
    """Handwritten digits, light on dark, with a margin as in MNIST."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images[:300], data.target[:300], strict=True)):
        small = Image.fromarray(np.uint8(image * 255 / 16)).resize((20, 20), Image.Resampling.BICUBIC)
        picture = Image.new("L", (28, 28))
        picture.paste(small, (4, 4))
        yield f"{label}/digit{number:03}.png", picture


def _programs(packages: Path, _chance: random.Random) -> Iterator[tuple[str, Image.Image]]:
    """Programs as pictures, a byte a pixel, as malware is looked at."""
    files = sorted(path for path in _installed("sklearn", "").rglob("*.so") if path.stat().st_size > 60_000)
    files += sorted(path for path in packages.rglob("*.py") if path.stat().st_size > 30_000)
    for number, path in enumerate(files[:60]):
        data = np.frombuffer(path.read_bytes()[:400_000], np.uint8)
        width = 2 ** int(np.log2(len(data) ** 0.5) + 1)
        yield (
            f"program{number:03}.png",
            Image.fromarray(data[: len(data) // width * width].reshape(-1, width)),
        )


SETS: Final[Mapping[str, Callable[[Path, random.Random], Iterator[tuple[str, Any]]]]] = {
    "photos": _photos,
    "pages": _turned((0, 90, 180, 270)),
    "flips": _turned((0, 180)),
    "lines": _lines,
    "faces": _faces,
    "digits": _digits,
    "programs": _programs,
}
