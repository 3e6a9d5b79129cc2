"""Photographs that nobody has sorted: they calibrate, and show whether an engine agrees with its network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np

from builder.kit import UNKNOWN
from models.archives import unpacked
from models.datasets import DatasetError, DataSplit, ImageSet, OnDamaged, default_cache_dir
from models.folders import SUFFIXES
from models.scan import scan_unlabelled

JUDGING_SHARE: Final = 0.5
_FEWEST: Final = 8  # images
_SEED: Final = 0


def has_no_classes(source: str) -> bool:
    """Whether a folder, or a ZIP file of one, holds images themselves, and no folders."""
    folder = unpacked(Path(source).expanduser(), default_cache_dir())
    if not folder.is_dir():
        return False
    entries = [path for path in folder.iterdir() if not path.name.startswith((".", "_"))]
    return any(_is_image(path) for path in entries) and not any(path.is_dir() for path in entries)


def open_unlabelled(source: str, on_damaged: OnDamaged = "stop") -> DataSplit:
    """The images under a folder, half of them to calibrate with and half to judge by.

    Raises:
        DatasetError: no such folder, hardly any images, or some that cannot be read and may not be left out.
    """
    path = Path(source).expanduser().resolve()
    root = unpacked(path, default_cache_dir())
    if not root.is_dir():
        raise DatasetError(
            f"{source} is a file; give a folder or a ZIP file of one"
            if path.exists()
            else f"no folder {source!r}"
        )
    found = scan_unlabelled(root, on_damaged=on_damaged)
    images = sorted(found.train)
    paths, digests = tuple(image.path for image in images), tuple(image.digest for image in images)
    if len(paths) < _FEWEST:
        raise DatasetError(f"{root} has {len(paths)} images; calibrating and judging take at least {_FEWEST}")
    everything = ImageSet(
        name=root.name,
        root=root,
        paths=paths,
        digests=digests,
        targets=np.full(len(paths), UNKNOWN, np.int64),
        labels=(),
        cache_dir=default_cache_dir(),
    )
    # Photographs in a row are alike, and copies of one file must not be in both parts.
    keys = [hashlib.sha256(f"{_SEED}{digest}".encode()).digest() for digest in digests]
    order = np.array(sorted(range(len(paths)), key=keys.__getitem__), np.int64)
    judging = max(1, round(JUDGING_SHARE * len(paths)))
    while judging < len(paths) - 1 and digests[order[judging - 1]] == digests[order[judging]]:
        judging += 1
    return DataSplit(
        name=root.name,
        source=str(path),
        fold=None,
        folds=None,
        description=f"no labels; {JUDGING_SHARE:.0%} judge, chosen by content",
        sha256=everything.sha256,
        train=everything.subset(np.sort(order[judging:]), f"{root.name}-unlabelled"),
        validation=everything.subset(np.sort(order[:judging]), f"{root.name}-unlabelled-held-out"),
        test=everything.subset(np.arange(0), f"{root.name}-none"),
        damaged=len(found.faults),
        summary=found.summary,
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
