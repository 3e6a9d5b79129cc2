"""Data sets that TrimRT knows by name: written as folders of images when they are first used."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.bars import for_each
from models.files import replace_folder
from models.folders import DatasetError
from models.glyphs import read_typefaces, write_glyphs

UNSHUFFLED_DIGITS: Final = "digits-unshuffled"
GLYPHS: Final = "glyphs"
FASHION_MNIST_FOLDER: Final = Path("/usr/share/datasets/fashion-mnist")

_FASHION_LABELS: Final = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def unpack_named(name: str, cache_dir: Path) -> Path:
    """The folder of images of a data set in `NAMED`, which is written if it is not there.

    Raises:
        DatasetError: a package with its sources is not installed, or the folder cannot be written.
    """
    try:
        return NAMED[name](cache_dir)
    except OSError as error:
        raise DatasetError(
            f"cannot unpack {name} in {cache_dir}: {error.strerror or error}; "
            "name another folder in TRIMRT_CACHE"
        ) from error


def _write_digits(cache_dir: Path) -> Path:
    folder = cache_dir / "digits"
    if not folder.is_dir():
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Grey levels 0 to 16.
        images = np.round(digits.images * 255 / 16).astype(np.uint8)
        with replace_folder(folder, cache=True) as new:
            _write_images(new, images, digits.target, [str(name) for name in digits.target_names])
    return folder


def _write_fashion_mnist(cache_dir: Path) -> Path:
    folder = cache_dir / "fashion-mnist"
    if not folder.is_dir():
        if not FASHION_MNIST_FOLDER.is_dir():
            raise DatasetError(
                f"fashion-mnist is not in {FASHION_MNIST_FOLDER}; "
                "install it: sudo apt install dataset-fashion-mnist"
            )
        with replace_folder(folder, cache=True) as new:
            for part, prefix in (("train", "train"), ("test", "t10k")):
                images = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-images-idx3-ubyte.gz")
                targets = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-labels-idx1-ubyte.gz")
                _write_images(new / part, images, targets, _FASHION_LABELS)
    return folder


def _write_glyphs(cache_dir: Path) -> Path:
    folder = cache_dir / GLYPHS
    if not folder.is_dir():
        with replace_folder(folder, cache=True) as new:
            write_glyphs(new, read_typefaces())
    return folder


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array in the IDX format of LeCun's MNIST: a magic number, big-endian sizes, then bytes."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _write_images(
    folder: Path, images: NDArray[np.uint8], targets: NDArray[np.integer], labels: Iterable[str]
) -> None:
    directories = [folder / label for label in labels]
    for directory in directories:
        directory.mkdir(parents=True)
    digits = len(str(len(images) - 1))

    def write(index: int) -> None:
        Image.fromarray(images[index]).save(directories[targets[index]] / f"{index:0{digits}d}.png")

    for_each(write, list(range(len(images))), "Writing images")


NAMED: Final[dict[str, Callable[[Path], Path]]] = {
    "digits": _write_digits,
    UNSHUFFLED_DIGITS: _write_digits,
    "fashion-mnist": _write_fashion_mnist,
    GLYPHS: _write_glyphs,
}
"""Each writes its folder of images in a cache directory, and returns it."""
