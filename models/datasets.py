"""Image data sets on disk, and how they are parted into training, validation and test images.

Training and calibration see `DataSplit.train` only; early stopping, the builder's accuracy gate and
every other choice look at `DataSplit.validation`; `DataSplit.test` only measures. This module imports
no torch.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from models.card import Card, Dataset
from models.errors import TrimRTError
from models.files import replace_file, replace_folder
from models.preprocessing import ImageError, Pixels, Preprocessing, load_pixels

FOLDS: Final = 5
SPLIT_SEED: Final = 42
VALIDATION_SHARE: Final = 0.1
UNSHUFFLED_DIGITS: Final = "digits-unshuffled"
FASHION_MNIST_FOLDER: Final = Path("/usr/share/datasets/fashion-mnist")

_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_HELD_OUT_FOLDERS: Final = ("test", "val", "valid", "validation")
_FASHION_LABELS: Final = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IN_MEMORY_BYTES: Final = 1 << 29  # larger sets of pixels are memory-mapped from the cache
_PROGRESS_FROM: Final = 5000  # images; fewer are read in a moment

_T = TypeVar("_T")
_R = TypeVar("_R")


class DatasetError(TrimRTError):
    """A data set that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Some images of a data set, with their classes.

    Attributes:
        name: of the data set and the part, e.g. `digits-fold0-train`.
        root: folder that the paths are under.
        paths: one file for each image.
        digests: SHA-256 of each file, as hexadecimal digits.
        targets: class index of each image, shape (N,).
        labels: class names, by index.
    """

    name: str
    root: Path
    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    targets: NDArray[np.int64]
    labels: tuple[str, ...]
    cache_dir: Path

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def sha256(self) -> str:
        """Hash over the sorted relative paths and contents of the images."""
        lines = sorted(
            f"{path.relative_to(self.root).as_posix()}\0{digest}\n"
            for path, digest in zip(self.paths, self.digests, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def subset(self, indices: NDArray[np.int64], name: str) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(
            name=name,
            root=self.root,
            paths=tuple(self.paths[i] for i in indices),
            digests=tuple(self.digests[i] for i in indices),
            targets=self.targets[indices],
            labels=self.labels,
            cache_dir=self.cache_dir,
        )

    def load_pixels(self, spec: Preprocessing, *, progress: bool = True) -> Pixels:
        """All images as the network gets them, through `models.preprocessing.load_pixels`.

        Pixels of more than half a gigabyte are kept in a file in the cache and memory-mapped.

        Returns:
            `uint8` array of shape (N, spec.height, spec.width, 3), RGB.

        Raises:
            DatasetError: an image cannot be read; the message names the file.
        """
        shape = (len(self), spec.height, spec.width, 3)
        if int(np.prod(shape)) <= _IN_MEMORY_BYTES:
            pixels = np.empty(shape, np.uint8)
            self._fill(pixels, spec, progress)
            return pixels
        order = "\n".join(path.relative_to(self.root).as_posix() for path in self.paths)
        key = hashlib.sha256(f"{self.sha256}{order}{spec.model_dump_json()}".encode()).hexdigest()[:32]
        path = self.cache_dir / "pixels" / f"{key}.npy"
        if not path.exists():
            with replace_file(path) as new:
                mapped = np.lib.format.open_memmap(new, "w+", np.uint8, shape)
                self._fill(mapped, spec, progress)
                mapped.flush()
        mapped_pixels: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped_pixels

    def _fill(self, pixels: Pixels, spec: Preprocessing, progress: bool) -> None:
        def load(item: tuple[int, Path]) -> None:
            index, path = item
            try:
                pixels[index] = load_pixels(path.read_bytes(), spec)
            except (ImageError, OSError) as error:
                raise DatasetError(f"cannot read {path}: {error}; remove or replace it") from error

        _for_each(load, list(enumerate(self.paths)), f"Reading {self.name}", progress)


@dataclass(frozen=True)
class DataSplit:
    """A data set parted into training, validation and test images; no image is in two parts."""

    name: str
    source: str
    fold: int | None
    folds: int | None
    description: str
    sha256: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, by index."""
        return self.train.labels

    def card(self) -> Dataset:
        """What a model card says about this data."""
        return Dataset(
            name=self.name,
            source=self.source,
            sha256=self.sha256,
            fold=self.fold,
            folds=self.folds,
            split=self.description,
            train_images=len(self.train),
            validation_images=len(self.validation),
            test_images=len(self.test),
        )


def default_cache_dir() -> Path:
    """`$TRIMRT_CACHE`, or `~/.cache/trimrt`."""
    configured = os.environ.get("TRIMRT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "trimrt"


def open_dataset(source: str, *, fold: int = 0, cache_dir: Path | None = None) -> DataSplit:
    """Find a data set and part it.

    Data that comes with a test part keeps it, and `fold` is not used. Other data is cut into five
    stratified folds, of which `fold` is the test part. A tenth of what is left, stratified, is set
    aside for validation. The same source and fold always give the same parts.

    Args:
        source: `digits` (scikit-learn's, 1797 grey 8x8 images), `digits-unshuffled` (the same, with folds
            that keep the file's order, which goes by writer: a harder split), `fashion-mnist` (Debian's
            package dataset-fashion-mnist), or a folder: `train/` and `test/` (or `val/`) with a folder of
            images for each class, or the class folders themselves.
        fold: 0 to 4.
        cache_dir: where data sets are unpacked; `default_cache_dir()` if None.

    Raises:
        DatasetError: no such data, or data that cannot be parted.
    """
    cache_dir = cache_dir or default_cache_dir()
    if not 0 <= fold < FOLDS:
        raise DatasetError(f"fold {fold} is not one of 0 to {FOLDS - 1}")
    if source in _NAMED:
        root, name = _NAMED[source](cache_dir), source
    else:
        root = Path(source).expanduser().resolve()
        name, source = _slug(root.name), str(root)
        if not root.is_dir():
            raise DatasetError(
                f"no data set {source!r}: "
                f"give {', '.join(_NAMED)}, or a folder with a folder of images for each class"
            )
    held_out = next((part for part in _HELD_OUT_FOLDERS if (root / part).is_dir()), None)
    if (root / "train").is_dir():
        if held_out is None:
            raise DatasetError(f"{root} has train/ but neither test/ nor val/ beside it; add one")
        return _presplit(name, source, root, held_out, cache_dir)
    return _cross_validation(name, source, root, fold, cache_dir)


def require_data_of(card: Card, split: DataSplit, *, named: bool) -> None:
    """Refuse data that the checkpoint of `card` cannot be judged on.

    Args:
        card: the checkpoint's.
        split: the data.
        named: by the user; else it is what the card names, and has to be just that.

    Raises:
        DatasetError: it has other classes, or changed since the training.
    """
    if list(split.labels) != card.labels:
        raise DatasetError(
            f"{split.source} has other classes than {card.name} was trained on; "
            "name the right data with --data"
        )
    if not named and split.sha256 != card.dataset.sha256:
        raise DatasetError(
            f"{split.source} is not what {card.name} was trained on: images were added, removed or changed, "
            "so it may have learned the images that are to judge it. Restore it, or name other data with "
            "--data"
        )


def _presplit(name: str, source: str, root: Path, held_out: str, cache_dir: Path) -> DataSplit:
    train = _scan(root / "train", root, f"{name}-train", cache_dir)
    test = _scan(root / held_out, root, f"{name}-test", cache_dir)
    if train.labels != test.labels:
        differing = sorted(set(train.labels) ^ set(test.labels))
        raise DatasetError(f"{root}: train/ and {held_out}/ have different classes: {', '.join(differing)}")
    shuffled_train, validation = _split_validation(train, name)
    whole = hashlib.sha256((train.sha256 + test.sha256).encode()).hexdigest()
    return DataSplit(
        name=name,
        source=source,
        fold=None,
        folds=None,
        description=f"train/ and {held_out}/ as they came; validation: {_VALIDATION_TEXT}",
        sha256=whole,
        train=shuffled_train,
        validation=validation,
        test=test,
    )


def _cross_validation(name: str, source: str, root: Path, fold: int, cache_dir: Path) -> DataSplit:
    from sklearn.model_selection import StratifiedKFold

    everything = _scan(root, root, name, cache_dir)
    smallest = int(np.bincount(everything.targets).min())
    if smallest < FOLDS:
        raise DatasetError(
            f"{root}: {FOLDS} folds need {FOLDS} images of every class; one class has {smallest}"
        )
    shuffle = source != UNSHUFFLED_DIGITS
    folds = StratifiedKFold(FOLDS, shuffle=shuffle, random_state=SPLIT_SEED if shuffle else None)
    rest, test = list(folds.split(everything.paths, everything.targets))[fold]
    name_and_fold = f"{name}-fold{fold}"
    train, validation = _split_validation(everything.subset(rest, f"{name_and_fold}-rest"), name_and_fold)
    return DataSplit(
        name=name,
        source=source,
        fold=fold,
        folds=FOLDS,
        description=f"StratifiedKFold({FOLDS}, "
        + (f"shuffle=True, random_state={SPLIT_SEED}); " if shuffle else "shuffle=False); ")
        + f"validation: {_VALIDATION_TEXT}",
        sha256=everything.sha256,
        train=train,
        validation=validation,
        test=everything.subset(test, f"{name_and_fold}-test"),
    )


_VALIDATION_TEXT: Final = f"{VALIDATION_SHARE:.0%} of the training part, stratified, seed {SPLIT_SEED}"


def _split_validation(images: ImageSet, name: str) -> tuple[ImageSet, ImageSet]:
    from sklearn.model_selection import train_test_split

    smallest = int(np.bincount(images.targets, minlength=len(images.labels)).min())
    validation_images = max(round(VALIDATION_SHARE * len(images)), len(images.labels))
    if smallest < 2 or len(images) - validation_images < len(images.labels):
        raise DatasetError(
            f"{images.root}: too few training images to set some of every class aside for validation"
        )
    train, validation = train_test_split(
        np.arange(len(images)), test_size=validation_images, stratify=images.targets, random_state=SPLIT_SEED
    )
    # In the data set's own order: shuffling is training's business.
    return (
        images.subset(np.sort(train), f"{name}-train"),
        images.subset(np.sort(validation), f"{name}-validation"),
    )


def _scan(folder: Path, root: Path, name: str, cache_dir: Path) -> ImageSet:
    """The images under `folder`, which has one folder for each class."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise DatasetError(f"{folder} has {len(classes)} class folders; a classifier needs at least two")
    for directory in classes:
        try:
            directory.name.encode()
        except UnicodeEncodeError:
            shown = directory.name.encode(errors="replace").decode()
            raise DatasetError(f"{folder} has a class folder {shown}, whose name is not UTF-8") from None
    found: list[tuple[Path, int]] = []
    for target, directory in enumerate(classes):
        images = [
            path for path in directory.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()
        ]
        if not images:
            raise DatasetError(f"{directory} has no images ({', '.join(sorted(_SUFFIXES))})")
        found += [(path, target) for path in images]
    # By file name first: the folds of `digits` are then those of scikit-learn's own array.
    found.sort(key=lambda item: (item[0].name, item[0].relative_to(root).as_posix()))
    paths = [path for path, _ in found]
    return ImageSet(
        name=name,
        root=root,
        paths=tuple(paths),
        digests=tuple(_for_each(_sha256, paths, f"Hashing {name}")),
        targets=np.array([target for _, target in found], np.int64),
        labels=tuple(path.name for path in classes),
        cache_dir=cache_dir,
    )


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error


def _for_each(function: Callable[[_T], _R], items: list[_T], text: str, progress: bool = True) -> list[_R]:
    """`function` of all `items` by a few threads, with a progress bar where it takes a while."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results: Iterable[_R] = pool.map(function, items)
        if progress and len(items) >= _PROGRESS_FROM:
            console = Console(stderr=True)
            hidden = not console.is_terminal
            results = track(results, text, total=len(items), console=console, transient=True, disable=hidden)
        try:
            return list(results)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _slug(text: str) -> str:
    """`text` as part of a model's name."""
    slug = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text.lower())
    return slug.strip("-") or "images"


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

    _for_each(write, list(range(len(images))), "Writing images")


_NAMED: Final[dict[str, Callable[[Path], Path]]] = {
    "digits": _write_digits,
    UNSHUFFLED_DIGITS: _write_digits,
    "fashion-mnist": _write_fashion_mnist,
}
