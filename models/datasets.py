"""Image data sets on disk, and how they are parted into training, validation and test images.

Training and calibration see `DataSplit.train` only; early stopping, the builder's accuracy gate and
every other choice look at `DataSplit.validation`; `DataSplit.test` only measures. This module imports
no torch.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.archives import unpacked
from models.bars import for_each
from models.card import Card, Dataset
from models.files import replace_file
from models.folders import DatasetError, OnDamaged, is_utf8, shown
from models.glyphs import GLYPHS_SHA256, typeface_of
from models.named_data import GLYPHS, NAMED, UNSHUFFLED_DIGITS, unpack_named
from models.naming import did_you_mean, nothing_at
from models.preprocessing import ImageError, Pixels, Preprocessing, load_pixels
from models.scan import MAX_PIXELS, Scan, listed, scan_folder
from models.scan import Image as FoundImage

__all__ = [
    "DataSplit",
    "DatasetError",
    "ImageSet",
    "OnDamaged",
    "default_cache_dir",
    "open_dataset",
    "reopen_dataset",
    "require_data_of",
]

FOLDS: Final = 5
SPLIT_SEED: Final = 42
VALIDATION_SHARE: Final = 0.1

_IN_MEMORY_BYTES: Final = 1 << 29  # larger sets of pixels are memory-mapped from the cache


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
        return _sha256_of("".join(lines))

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

    def spread(self, most: int, name: str) -> ImageSet:
        """At most so many of the images, evenly over their order."""
        places = np.linspace(0, len(self) - 1, min(most, len(self)))
        return self.subset(places.astype(np.int64), name)

    def load_pixels(self, spec: Preprocessing, *, progress: bool = True) -> Pixels:
        """All images as the network gets them, through `models.preprocessing.load_pixels`.

        Pixels of more than half a gigabyte are kept in a file in the cache and memory-mapped.

        Returns:
            `uint8` array of shape (N, spec.height, spec.width, 3), RGB.

        Raises:
            DatasetError: images cannot be read; the message names all those files.
        """
        shape = (len(self), spec.height, spec.width, 3)
        if int(np.prod(shape)) <= _IN_MEMORY_BYTES:
            pixels = np.empty(shape, np.uint8)
            self._fill(pixels, spec, progress)
            return pixels
        order = "\n".join(path.relative_to(self.root).as_posix() for path in self.paths)
        key = _sha256_of(f"{self.sha256}{order}{spec.model_dump_json()}")[:32]
        path = self.cache_dir / "pixels" / f"{key}.npy"
        if not path.exists():
            with replace_file(path) as new:
                mapped = np.lib.format.open_memmap(new, "w+", np.uint8, shape)
                self._fill(mapped, spec, progress)
                mapped.flush()
        mapped_pixels: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped_pixels

    def _fill(self, pixels: Pixels, spec: Preprocessing, progress: bool) -> None:
        faults: dict[Path, str] = {}

        def load(item: tuple[int, Path]) -> None:
            index, path = item
            try:
                pixels[index] = load_pixels(path.read_bytes(), spec, max_pixels=MAX_PIXELS)
            except (ImageError, OSError) as error:
                faults[path] = str(error)

        for_each(load, list(enumerate(self.paths)), f"Reading {self.name}", progress)
        if faults:
            advice = "remove or replace, or leave out with --on-damaged skip:"
            count = f"{len(faults):,} file{'s' * (len(faults) != 1)}"
            raise DatasetError(
                "\n".join([f"{self.root}: cannot read {count}; {advice}", *listed(faults, self.root)])
            )


@dataclass(frozen=True)
class DataSplit:
    """A data set parted into training, validation and test images; no file is in two parts.

    Attributes:
        damaged: how many files were left out because they cannot be read.
        summary: what the scan found, to print, in lines of less than 80 columns; empty for named data sets.
    """

    name: str
    source: str
    fold: int | None
    folds: int | None
    description: str
    sha256: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    damaged: int = 0
    summary: tuple[str, ...] = ()

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
            damaged_files=self.damaged,
        )


def default_cache_dir() -> Path:
    """`$TRIMRT_CACHE`, or `~/.cache/trimrt`.

    Raises:
        DatasetError: neither is known, for this user has no home folder.
    """
    if configured := os.environ.get("TRIMRT_CACHE"):
        return Path(configured)
    try:
        return Path.home() / ".cache" / "trimrt"
    except RuntimeError:
        raise DatasetError(
            "this user has no home folder to unpack data sets in; name a folder in TRIMRT_CACHE"
        ) from None


def open_dataset(
    source: str,
    *,
    fold: int = 0,
    cache_dir: Path | None = None,
    on_damaged: OnDamaged = "stop",
    validation_share: float = VALIDATION_SHARE,
) -> DataSplit:
    """Find a data set and part it.

    Data that comes with a test part keeps it, and `fold` is not used. Other data is cut into five
    stratified folds, of which `fold` is the test part. A tenth of what is left, stratified, is set
    aside for validation. Parts of `glyphs` are of whole typefaces. The same source, fold and share always
    give the same parts.

    Args:
        source: `digits` (scikit-learn's, 1797 grey 8x8 images), `digits-unshuffled` (the same, with folds
            that keep the file's order, which goes by writer: a harder split), `fashion-mnist` (Debian's
            package dataset-fashion-mnist), `glyphs` (letters and figures of 110 typefaces in Debian's font
            packages), or a folder or a ZIP file of one: `train/` and `test/` (or `val/`) with a folder of
            images for each class, or the class folders themselves; see `models.folders`.
        fold: 0 to 4.
        cache_dir: where data sets are unpacked; `default_cache_dir()` if None.
        on_damaged: what to do about files that cannot be read: stop and name all, or leave them out.
        validation_share: of the images that are not for testing.

    Raises:
        DatasetError: no such data, or data that cannot be parted.
    """
    cache_dir = cache_dir or default_cache_dir()
    if not 0 <= fold < FOLDS:
        raise DatasetError(f"fold {fold} is not one of 0 to {FOLDS - 1}")
    if source in NAMED:
        root, name = unpack_named(source, cache_dir), source
    else:
        given, path = source, Path(source).expanduser().resolve()
        source, root = str(path), unpacked(path, cache_dir)
        name = _slug(root.name)
        if not root.is_dir():
            raise DatasetError(_no_such_data(given))
        if not is_utf8(source):
            raise DatasetError(f"{shown(source)}: the name of this folder is not UTF-8; rename it")
    found = scan_folder(
        root,
        smallest=lambda parted: 2 if parted else FOLDS,
        on_damaged=on_damaged,
        trusted=source in NAMED,
    )
    if found.part_names:
        return _presplit(name, source, root, found, cache_dir, validation_share)
    if source == GLYPHS:
        return _by_typeface(root, fold, found, cache_dir, validation_share)
    return _cross_validation(name, source, root, fold, found, cache_dir, validation_share)


def _no_such_data(source: str) -> str:
    path = Path(source).expanduser()
    give = f"give {', '.join(NAMED)}, or a folder or ZIP file with a folder of images for each class"
    if path.exists():
        return f"{source} is a file; {give}"
    like = did_you_mean(source, NAMED)
    return f"no data set {source!r}{like}; {give}" if like else f"{nothing_at(path)}; {give}"


def reopen_dataset(card: Dataset) -> DataSplit:
    """The data that a model card names, without what was left out then.

    Raises:
        DatasetError: it is not here any more, or has new faults.
    """
    return open_dataset(card.source, fold=card.fold or 0, on_damaged="skip" if card.damaged_files else "stop")


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


def _presplit(
    name: str, source: str, root: Path, found: Scan, cache_dir: Path, validation_share: float
) -> DataSplit:
    train = _image_set(found.train, root, f"{name}-train", cache_dir)
    test = _image_set(found.held_out, root, f"{name}-test", cache_dir)
    shuffled_train, validation = _split_validation(train, name, validation_share)
    whole = hashlib.sha256((train.sha256 + test.sha256).encode()).hexdigest()
    return DataSplit(
        name=name,
        source=source,
        fold=None,
        folds=None,
        description=f"{' and '.join(f'{shown(part)}/' for part in found.part_names)} as they came; "
        f"validation: {_validation_text(validation_share)}",
        sha256=whole,
        train=shuffled_train,
        validation=validation,
        test=test,
        damaged=len(found.faults),
        summary=found.summary,
    )


def _cross_validation(
    name: str, source: str, root: Path, fold: int, found: Scan, cache_dir: Path, validation_share: float
) -> DataSplit:
    from sklearn.model_selection import StratifiedKFold

    everything = _image_set(found.train, root, name, cache_dir)
    shuffle = source != UNSHUFFLED_DIGITS
    folds = StratifiedKFold(FOLDS, shuffle=shuffle, random_state=SPLIT_SEED if shuffle else None)
    rest, test = list(folds.split(everything.paths, everything.targets))[fold]
    name_and_fold = f"{name}-fold{fold}"
    train, validation = _split_validation(
        everything.subset(rest, f"{name_and_fold}-rest"), name_and_fold, validation_share
    )
    return DataSplit(
        name=name,
        source=source,
        fold=fold,
        folds=FOLDS,
        description=f"StratifiedKFold({FOLDS}, "
        + (f"shuffle=True, random_state={SPLIT_SEED}); " if shuffle else "shuffle=False); ")
        + f"validation: {_validation_text(validation_share)}",
        sha256=everything.sha256,
        train=train,
        validation=validation,
        test=everything.subset(test, f"{name_and_fold}-test"),
        damaged=len(found.faults),
        summary=found.summary,
    )


def _by_typeface(root: Path, fold: int, found: Scan, cache_dir: Path, validation_share: float) -> DataSplit:
    """`glyphs` in parts of whole typefaces: none that tests was seen before."""
    from sklearn.model_selection import GroupKFold, GroupShuffleSplit

    everything = _image_set(found.train, root, GLYPHS, cache_dir)
    typefaces = np.array([typeface_of(path) for path in everything.paths])
    folds = GroupKFold(FOLDS, shuffle=True, random_state=SPLIT_SEED)
    rest, test = list(folds.split(typefaces, groups=typefaces))[fold]
    share = GroupShuffleSplit(1, test_size=validation_share, random_state=SPLIT_SEED)
    train, validation = next(share.split(rest, groups=typefaces[rest]))
    name = f"{GLYPHS}-fold{fold}"
    return DataSplit(
        name=GLYPHS,
        source=GLYPHS,
        fold=fold,
        folds=FOLDS,
        description=f"whole typefaces: GroupKFold({FOLDS}, shuffle=True, random_state={SPLIT_SEED}); "
        f"validation: {validation_share:.0%} of the other typefaces, seed {SPLIT_SEED}",
        sha256=everything.sha256,
        train=everything.subset(rest[train], f"{name}-train"),
        validation=everything.subset(rest[validation], f"{name}-validation"),
        test=everything.subset(test, f"{name}-test"),
        summary=() if everything.sha256 == GLYPHS_SHA256 else _OTHER_GLYPHS,
    )


_OTHER_GLYPHS: Final = (
    "glyphs: not the images that docs/data.md describes: fonts or Pillow's FreeType",
    "are of other versions. Compare only networks of this machine.",
)


def _validation_text(share: float) -> str:
    return f"{share:.0%} of the training part, stratified, seed {SPLIT_SEED}"


def _split_validation(images: ImageSet, name: str, share: float) -> tuple[ImageSet, ImageSet]:
    from sklearn.model_selection import train_test_split

    smallest = int(np.bincount(images.targets, minlength=len(images.labels)).min())
    validation_images = max(round(share * len(images)), len(images.labels))
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


def _image_set(images: list[FoundImage], root: Path, name: str, cache_dir: Path) -> ImageSet:
    # By file name first: the folds of `digits` are then those of scikit-learn's own array.
    images = sorted(images, key=lambda image: (image.path.name, image.path.relative_to(root).as_posix()))
    labels = tuple(sorted({image.label for image in images}))
    index = {label: number for number, label in enumerate(labels)}
    return ImageSet(
        name=name,
        root=root,
        paths=tuple(image.path for image in images),
        digests=tuple(image.digest for image in images),
        targets=np.array([index[image.label] for image in images], np.int64),
        labels=labels,
        cache_dir=cache_dir,
    )


def _sha256_of(text: str) -> str:
    """The hash of `text`, in which names of files may be in any encoding."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _slug(text: str) -> str:
    """`text` as part of a model's name."""
    slug = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text.lower())
    return slug.strip("-") or "images"
