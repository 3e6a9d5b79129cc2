"""`glyphs`: letters and figures of typefaces that Debian's font packages bring, drawn by FreeType.

Each of the 62 classes has two images of every typeface: one from its regular face, and one from its bold or
italic (from the regular again where there is no other). Images are 32 pixels wide and high, white on black,
lightly distorted. Letters keep their size and their place on the line, which alone tell c from C in most
typefaces.

All chance comes from a hash of the file's name and NumPy's frozen generator. Characters are drawn at four
times their size and averaged, which leaves little of what FreeType's versions do differently.
"""

from __future__ import annotations

import csv
import hashlib
import math
import string
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from models.bars import for_each
from models.folders import DatasetError

__all__ = [
    "GLYPHS_SHA256",
    "LABELS",
    "Typeface",
    "draw",
    "open_face",
    "outline",
    "read_typefaces",
    "typeface_of",
    "write_glyphs",
]

FONTS_FOLDER: Final = Path("/usr/share/fonts")
LABELS: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
# Of all images, with the fonts of Debian 12 and 13 and the FreeType of Pillow 12.0 to 13.0.
GLYPHS_SHA256: Final = "5c3b186cdba1974b7812de9d155c486a7b004765c9720648e4c3a4a7ce22b94d"

_SIDE: Final = 32
_TIMES: Final = 4  # so much larger is a character drawn
_CAP_HEIGHT: Final = 16  # of capitals, whose middle is the image's
_FACES: Final = 2


class Typeface(NamedTuple):
    """A row of `typefaces.csv`.

    Attributes:
        name: lower case, digits and hyphens.
        package: of Debian.
        first: the regular face's file, in `FONTS_FOLDER`.
        second: the bold or italic face's, or the regular one's again.
    """

    name: str
    package: str
    first: str
    second: str


class _Distortion(NamedTuple):
    """How an image departs from what FreeType draws. Lengths are in pixels of the image."""

    angle: float  # radians
    shear: float
    scale: float
    shift: tuple[float, float]
    stroke: float  # the outline grows by so much on each side
    blur: float  # standard deviation
    ink: int  # grey levels
    ground: int
    noise: NDArray[np.int64]  # added to the grey levels; shape (32, 32)


def read_typefaces() -> tuple[Typeface, ...]:
    """The typefaces of the data set, whose files are the same in Debian 12 and 13."""
    with Path(__file__).with_name("typefaces.csv").open(newline="") as file:
        return tuple(Typeface(*row) for row in list(csv.reader(file))[1:])


def typeface_of(path: Path) -> str:
    """The typeface's name, of an image's path."""
    return path.stem.rpartition("-")[0]


def write_glyphs(folder: Path, typefaces: tuple[Typeface, ...]) -> None:
    """Draw all images, `CLASS/TYPEFACE-FACE.png`.

    Args:
        folder: to fill.
        typefaces: whose files are in `FONTS_FOLDER`.

    Raises:
        DatasetError: fonts are missing; the message names the packages. Nothing is written.
    """
    missing = {
        typeface.package
        for typeface in typefaces
        for file in (typeface.first, typeface.second)
        if not (FONTS_FOLDER / file).is_file()
    }
    if missing:
        raise DatasetError(
            f"glyphs needs the fonts of {len(missing)} more Debian packages in {FONTS_FOLDER}; "
            f"install them: sudo apt-get install {' '.join(sorted(missing))}"
        )
    for label in LABELS:
        (folder / label).mkdir(parents=True)

    def write(item: tuple[Typeface, int]) -> None:
        typeface, face = item
        font = open_face(FONTS_FOLDER / (typeface.first, typeface.second)[face])
        for label in LABELS:
            name = f"{label}/{typeface.name}-{face}.png"
            # Stored, not compressed: the bytes are then the same with every zlib.
            draw(font, label, name).save(folder / name, compress_level=0)

    faces = [(typeface, face) for typeface in typefaces for face in range(_FACES)]
    for_each(write, faces, "Drawing the typefaces")


def draw(font: ImageFont.FreeTypeFont, character: str, seed: str) -> Image.Image:
    """A character, 32 pixels wide and high, grey; `seed` decides how it is distorted."""
    distortion = _distortion(seed)
    drawn = outline(font, character, round(distortion.stroke * _TIMES))
    moved = drawn.transform(
        (_SIDE * _TIMES, _SIDE * _TIMES),
        Image.Transform.AFFINE,
        _to_outline(distortion, drawn),
        Image.Resampling.BILINEAR,
    )
    mask = moved.filter(ImageFilter.GaussianBlur(distortion.blur * _TIMES)).reduce(_TIMES)
    covered = np.asarray(mask, np.int64)
    levels = distortion.ground + (covered * (distortion.ink - distortion.ground) + 127) // 255
    return Image.fromarray(np.clip(levels + distortion.noise, 0, 255).astype(np.uint8))


def open_face(path: Path) -> ImageFont.FreeTypeFont:
    """The face of a font file, in the size that gives its capitals the height that `outline` draws."""
    basic = ImageFont.Layout.BASIC  # the other layout needs a library that not all builds of Pillow have
    sample = ImageFont.truetype(path, 200, layout_engine=basic)
    height = -sample.getbbox("H", anchor="ls")[1]
    return ImageFont.truetype(path, round(200 * _CAP_HEIGHT * _TIMES / height), layout_engine=basic)


def outline(font: ImageFont.FreeTypeFont, character: str, stroke: int = 0) -> Image.Image:
    """A character as FreeType draws it, four times as large as in the data set.

    Args:
        font: from `open_face`.
        character: one.
        stroke: pixels by which its outline grows on each side.

    Returns:
        White on black. The character's middle is the image's from left to right, a capital's is from top to
        bottom.
    """
    left, top, right, bottom = font.getbbox(character, anchor="ls", stroke_width=stroke)
    middle = -_CAP_HEIGHT * _TIMES / 2
    half_width = math.ceil((right - left) / 2) + 1
    half_height = math.ceil(max(middle - top, bottom - middle)) + 1
    image = Image.new("L", (2 * half_width, 2 * half_height))
    place = (half_width - (left + right) / 2, half_height - middle)
    ImageDraw.Draw(image).text(place, character, 255, font, "ls", stroke_width=stroke)
    return image


def _to_outline(distortion: _Distortion, drawn: Image.Image) -> tuple[float, ...]:
    """From coordinates of the distorted image to those of the drawn one, as `Image.transform` takes them."""
    room = _TIMES * (_SIDE - 2)  # wider and higher characters are made smaller
    fit = min(1.0, room / drawn.width, room / drawn.height)
    cos, sin = math.cos(distortion.angle), math.sin(distortion.angle)
    factor = 1 / (distortion.scale * fit)
    a, b = cos * factor, (sin + distortion.shear * cos) * factor
    d, e = -sin * factor, (cos - distortion.shear * sin) * factor
    x, y = (_TIMES * (_SIDE / 2 + shift) for shift in distortion.shift)
    return (a, b, drawn.width / 2 - a * x - b * y, d, e, drawn.height / 2 - d * x - e * y)


def _distortion(seed: str) -> _Distortion:
    random = np.random.RandomState(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big"))
    strength = random.randint(0, 16)
    return _Distortion(
        angle=math.radians(random.uniform(-6, 6)),
        shear=random.uniform(-0.12, 0.12),
        scale=random.uniform(0.88, 1.12),
        shift=(random.uniform(-1.5, 1.5), random.uniform(-1.5, 1.5)),
        stroke=random.uniform(0, 0.5),
        blur=random.uniform(0, 0.7),
        ink=random.randint(140, 256),
        ground=random.randint(0, 48),
        noise=random.randint(-strength, strength + 1, (_SIDE, _SIDE)),
    )
