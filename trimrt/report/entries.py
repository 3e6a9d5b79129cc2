"""A model on its way into the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import TrimRTError
from trimrt.report.data import Choice
from trimrt.report.discovery import Checkpoint, EnginePackage
from trimrt.report.results import Measured
from trimrt.report.subjects import Subject

Item = Checkpoint | EnginePackage
GroupKey = tuple[str, int | None, tuple[str, ...]]


def group_key(item: Item, choice: Choice) -> GroupKey:
    """Hash and fold of the data, and the classes; the hash is empty where the data is not known."""
    if choice.split is not None:
        return choice.split.sha256, choice.split.fold, choice.split.labels
    if choice.card is not None:
        return choice.card.dataset.sha256, choice.card.dataset.fold, tuple(choice.card.labels)
    labels = item.card.labels if isinstance(item, Checkpoint) else item.manifest.labels
    return "", None, tuple(labels)


@dataclass
class Entry:
    """One model, and what has been found out about it so far.

    Attributes:
        number: by which the page refers to it.
        item: where it is.
        choice: the images that it is measured on.
        subject: the running model; None where it cannot run.
        labels: class indices that it gives the test images, shape (N,).
        missing: why something could not be measured.
        measured: by field of `results.Model`.
    """

    number: int
    item: Item
    choice: Choice
    subject: Subject | None = None
    labels: NDArray[np.int64] | None = None
    missing: dict[Measured, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As its card or manifest has it."""
        return self.item.card.name if isinstance(self.item, Checkpoint) else self.item.manifest.name

    @property
    def weights(self) -> str | None:
        """Hash of the checkpoint's weights, whether it is one or was built from one."""
        if isinstance(self.item, Checkpoint):
            return self.item.card.weights_sha256
        return self.item.manifest.provenance.checkpoint_sha256

    @property
    def is_fp32(self) -> bool:
        """Whether others of the same weights are held against it."""
        return isinstance(self.item, Checkpoint) or self.item.manifest.precision == "fp32"

    @property
    def group(self) -> GroupKey:
        """What it shares with those that it can be compared with: test images, or at least classes."""
        return group_key(self.item, self.choice)

    @contextmanager
    def noting(self, *what: Measured) -> Iterator[None]:
        """What goes wrong inside is why that could not be measured, and nothing else's concern."""
        try:
            yield
        except TrimRTError as error:
            self.missing |= dict.fromkeys(what, " ".join(str(error).split()))
