"""How many of the images of `glyphs` can be told apart at all: which classes a typeface draws alike.

    python -m experiments.glyph_ceiling

Two classes are twins in a face if one covers the other when it is scaled and moved up or down by no more
than the distortion does: the cosine of their images is at least 0.97. Whoever knows the typeface can still
only guess among twins. That is a ceiling of accuracy; not to know the typeface costs more.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Final

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from experiments.markdown import table
from models import glyphs
from models.bars import for_each
from models.glyphs import LABELS, open_face, outline, read_typefaces
from trimrt.options import HELP

_SCALES: Final = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.25)  # 0.88 / 1.12 to 1.12 / 0.88
_SHIFTS: Final = range(-3, 4)  # up and down; from side to side nothing is told by the place
_ALIKE: Final = 0.97
_SIDE: Final = 32
_TIMES: Final = 4  # of outlines, so much larger
_SHOWN: Final = 12


def twins(font: ImageFont.FreeTypeFont) -> NDArray[np.bool_]:
    """Which classes look alike in a face, shape (62, 62); none is its own twin."""
    outlines = [outline(font, label) for label in LABELS]
    whole = _scaled(outlines, 1.0).reshape(len(LABELS), -1)
    alike = np.zeros((len(LABELS), len(LABELS)), bool)
    for scale in _SCALES:
        scaled = _scaled(outlines, scale)
        for shift in _SHIFTS:
            moved = np.roll(scaled, shift, axis=1).reshape(len(LABELS), -1)
            alike |= moved @ whole.T >= _ALIKE
    alike |= alike.T
    np.fill_diagonal(alike, False)
    return alike


def _scaled(outlines: list[Image.Image], scale: float) -> NDArray[np.float32]:
    """The outlines in the middle of small images, each of length 1 as a vector; shape (62, 32, 32)."""
    images = []
    for drawn in outlines:
        square = Image.new("L", (_SIDE * _TIMES, _SIDE * _TIMES))
        width, height = (max(1, round(scale * length)) for length in drawn.size)
        place = (square.width - width) // 2, (square.height - height) // 2
        square.paste(drawn.resize((width, height)), place)
        images.append(np.asarray(square.reduce(_TIMES), np.float32))
    pixels = np.stack(images)
    unit: NDArray[np.float32] = pixels / np.linalg.norm(pixels, axis=(1, 2), keepdims=True)
    return unit


@click.command(context_settings=HELP)
def main() -> None:
    """Print the ceiling of accuracy on `glyphs` and the pairs of classes that most faces draw alike."""
    faces = sorted({file for typeface in read_typefaces() for file in (typeface.first, typeface.second)})
    found = for_each(lambda file: twins(open_face(glyphs.FONTS_FOLDER / file)), faces, "Comparing classes")
    ceiling = np.mean([1 / (1 + alike.sum(axis=1)) for alike in found])
    pairs = Counter(
        f"{LABELS[one]} {LABELS[other]}"
        for alike in found
        for one, other in combinations(range(len(LABELS)), 2)
        if alike[one, other]
    )
    click.echo(f"{len(faces)} faces; ceiling {ceiling:.1%}\n")
    rows = [[f"`{pair}`", f"{count / len(faces):.0%}"] for pair, count in pairs.most_common(_SHOWN)]
    click.echo(table(["classes", "alike in so many faces"], rows))


if __name__ == "__main__":
    main()
