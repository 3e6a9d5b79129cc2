"""Build an INT8 engine from the student that ships with TrimRT, and ask it about an image.

    python examples/build_and_ask.py docs/images/7.png

Needs `pip install 'trimrt[compress]'`.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from builder import BuildOptions, build
from models.preprocessing import load_pixels
from models.pretrained import DIGITS_STUDENT
from runtime import load_engine


def main(image: Path) -> None:
    """Print what the image shows."""
    (package,) = build(DIGITS_STUDENT, "engines", BuildOptions(precisions=("int8",), target="openvino"))
    with closing(load_engine(package.folder)) as engine, closing(engine.open_slot()) as slot:
        load_pixels(image.read_bytes(), engine.manifest.preprocessing, out=slot.pixels[0])
        probabilities = slot.infer(1).probabilities[0]
    label = package.manifest.labels[probabilities.argmax()]
    print(f"{package.folder} says {label}, {probabilities.max():.1%} sure")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
