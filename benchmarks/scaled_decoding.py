"""Does decoding large JPEGs at a reduced scale change the labels? `python -m benchmarks.scaled_decoding`.

Test images of the engine's own data set are enlarged to 12 megapixels, compressed, and labelled twice:
decoded at the reduced scale, and decoded in full.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import click
from PIL import Image
from rich.progress import track

from models.cores import cores
from models.datasets import open_dataset
from models.preprocessing import Pixels, load_pixels
from runtime.loading import load_engine
from runtime.manifest import EngineError
from trimrt.options import HELP


@click.command(context_settings=HELP)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--data", default="digits", help="`digits`, `fashion-mnist`, `glyphs` or a folder.")
@click.option("--images", default=300, help="How many test images.")
@click.option("--megapixels", default=12.0, help="Size that they are enlarged to.")
def main(package: Path, data: str, images: int, megapixels: float) -> None:
    """Compare the labels that PACKAGE gives to reduced-scale and to full decoding."""
    paths = open_dataset(data).test.paths[:images]
    try:
        agreeing = agreeing_labels(package, paths, megapixels)
    except EngineError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{agreeing} of {len(paths)} labels agree ({agreeing / len(paths):.2%})")


def agreeing_labels(package: Path, paths: Sequence[Path], megapixels: float) -> int:
    """How many of the images, enlarged to so many million pixels, get the same label either way.

    Raises:
        EngineError: the engine does not load, or failed.
    """
    with closing(load_engine(package)) as engine, closing(engine.open_slot()) as slot:
        spec = engine.manifest.preprocessing
        exact = spec.model_copy(update={"scaled_decoding": False})

        def decode(path: Path) -> list[Pixels]:
            file = enlarged(path, megapixels)
            return [load_pixels(file, how) for how in (spec, exact)]

        def label(pixels: Pixels) -> int:
            slot.pixels[0] = pixels
            return int(slot.infer(1).logits.argmax())

        with ThreadPoolExecutor(cores()) as pool:
            both = track(pool.map(decode, paths), "labelling", total=len(paths), transient=True)
            return sum(label(scaled) == label(full) for scaled, full in both)


def enlarged(path: Path, megapixels: float) -> bytes:
    """The image as a JPEG of that many million pixels."""
    with Image.open(path) as image:
        scale = math.sqrt(megapixels * 1e6 / (image.width * image.height))
        size = (round(image.width * scale), round(image.height * scale))
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    large.save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
