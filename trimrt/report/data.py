"""The test images that a model is measured on: of its own data set, or of the one given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from models.card import Card, CheckpointError, Dataset, read_card
from models.datasets import (
    DatasetError,
    DataSplit,
    OnDamaged,
    open_dataset,
    reopen_dataset,
    require_data_of,
)
from models.preprocessing import Pixels, Preprocessing
from runtime.manifest import Manifest
from trimrt.report.discovery import Checkpoint, EnginePackage

_FOLD: Final = re.compile(r"-fold(\d)-validation\b")


class DataSets:
    """Opens each data set once, and reads its test images once for each preprocessing.

    Args:
        source: what `--data` names, for all models; None: what each was trained on.
        on_damaged: what to do about images of `source` that cannot be read.
        note: takes each line of what was found in a folder of images.
    """

    def __init__(
        self,
        source: str | None,
        on_damaged: OnDamaged = "stop",
        note: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.source = source
        self._on_damaged: OnDamaged = on_damaged
        self._open = lru_cache(maxsize=None)(open_dataset)
        self._reopen = lru_cache(maxsize=None)(reopen_dataset)
        self._note = note
        self._noted: set[tuple[str, ...]] = set()
        self._pixels: dict[tuple[str, int | None, str], Pixels] = {}

    def named(self, source: str, fold: int) -> DataSplit:
        """What `--data` names.

        Raises:
            DatasetError: there is none, or it cannot be used.
        """
        return self._told(self._open(source, fold=fold, on_damaged=self._on_damaged))

    def of(self, trained_on: Dataset) -> DataSplit:
        """What `--data` names, in the fold of `trained_on`; without it `trained_on` itself.

        Raises:
            DatasetError: it is not here, or cannot be used.
        """
        if self.source is None:
            return self._told(self._reopen(trained_on))
        return self.named(self.source, trained_on.fold or 0)

    def _told(self, split: DataSplit) -> DataSplit:
        if split.summary not in self._noted:
            self._noted.add(split.summary)
            for line in split.summary:
                self._note(line)
        return split

    def test_pixels(self, split: DataSplit, spec: Preprocessing) -> Pixels:
        """The test images as a network with that preprocessing gets them, uint8 NHWC.

        Raises:
            DatasetError: an image cannot be read.
        """
        key = (split.test.sha256, split.fold, spec.model_dump_json())
        if key not in self._pixels:
            self._pixels[key] = split.test.load_pixels(spec)
        return self._pixels[key]


@dataclass(frozen=True)
class Choice:
    """The data that a model is measured on.

    Attributes:
        split: None if there is none.
        reason: why there is none.
        card: of the model, or of the checkpoint that an engine was built from, if that is known.
        caution: what is uncertain about this choice.
    """

    split: DataSplit | None
    reason: str = ""
    card: Card | None = None
    caution: str | None = None


def data_of_checkpoint(card: Card, data: DataSets) -> Choice:
    """The data that `card` names, if it is here and unchanged, or `--data`."""
    try:
        split = data.of(card.dataset)
    except DatasetError as error:
        return Choice(None, f"its test images are not here: {error}", card)
    try:
        require_data_of(card, split, named=data.source is not None)
    except DatasetError as error:
        return Choice(None, str(error), card)
    return Choice(split, card=card)


def data_of_package(manifest: Manifest, checkpoints: Sequence[Checkpoint], data: DataSets) -> Choice:
    """The data of the checkpoint that the package was built from, or `--data`.

    The checkpoint is one of those given, or the one that the package's build command names, if it
    still has the same weights. Without it, the data of another checkpoint that was judged by images of
    the same name will do.
    """
    card = _card_of(manifest, checkpoints)
    if card is not None:
        choice = data_of_checkpoint(card, data)
        if choice.split is not None and list(choice.split.labels) != manifest.labels:
            return Choice(None, f"{choice.split.source} has other classes than the engine", card)
        return choice
    if data.source is None:
        return _data_by_name(manifest, checkpoints, data)
    judged_by = manifest.evidence.image_set if manifest.evidence else ""
    fold = _FOLD.search(judged_by)
    try:
        split = data.named(data.source, int(fold[1]) if fold else 0)
    except DatasetError as error:
        return Choice(None, f"its test images are not here: {error}")
    if list(split.labels) != manifest.labels:
        return Choice(None, f"{split.source} has other classes than the engine")
    caution = None
    if split.fold is not None and not judged_by.startswith(split.validation.name):
        caution = (
            f"the package does not say which of {split.source}'s folds it was kept from, "
            "so it may have learned these test images"
        )
    return Choice(split, caution=caution)


def _data_by_name(manifest: Manifest, checkpoints: Sequence[Checkpoint], data: DataSets) -> Choice:
    """The data of a checkpoint beside the package that was judged by images of the same name."""
    judged_by = manifest.evidence.image_set if manifest.evidence else ""
    for checkpoint in checkpoints:
        split = data_of_checkpoint(checkpoint.card, data).split
        if split and judged_by.startswith(split.validation.name) and list(split.labels) == manifest.labels:
            caution = (
                f"the checkpoint that it was built from is not here; that its data is {split.source} is "
                f"known from the name of its validation images only ({judged_by})"
            )
            return Choice(split, caution=caution)
    return Choice(
        None,
        "its data set is not known: the package was built from a checkpoint that is not here; "
        "give that too, or name the data with --data",
    )


def _card_of(manifest: Manifest, checkpoints: Sequence[Checkpoint]) -> Card | None:
    wanted = manifest.provenance.checkpoint_sha256
    if wanted is None:
        return None
    for checkpoint in checkpoints:
        if checkpoint.card.weights_sha256 == wanted:
            return checkpoint.card
    try:
        words = shlex.split(manifest.build_command)
        card = read_card(Path(words[2]))
    except (CheckpointError, IndexError, OSError, ValueError):
        return None
    return card if card.weights_sha256 == wanted else None


def checkpoint_of(package: EnginePackage, checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint that `package` was built from, if it is among those."""
    wanted = package.manifest.provenance.checkpoint_sha256
    return next((item for item in checkpoints if wanted and item.card.weights_sha256 == wanted), None)
