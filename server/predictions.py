"""What an engine said of live images: which labels, how sure, and how far that is from validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.drift import CONFIDENCES, classes_apart, count_predictions, grouped, stability_index
from runtime.manifest import Manifest
from runtime.manifest import Predictions as Expected

OTHERS: Final = "(other)"  # all labels that are not told apart

_RECENT: Final = 1000  # images; as many and up to twice as many are recent
_MOST_UNCOUNTED: Final = 262_144  # probabilities: a megabyte, which is counted in a millisecond
_MOST_BATCHES: Final = 1000  # as many small ones take as long


class Predictions:
    """Counts of one engine's predictions. Touched by the event loop's thread only.

    Args:
        manifest: of the engine.

    Attributes:
        labels: of the engine.
        classes: images since start by likeliest class; shape `(classes,)`.
        confidence: images since start by confidence, see `runtime.drift.CONFIDENCES`.
        sum: of the confidences.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.labels = manifest.labels
        self._expected = _expected(manifest)
        known = None if self._expected is None else self._expected.classes
        self._apart = classes_apart(known, len(self.labels))
        self.classes, self.confidence = self._zeros()
        self.sum = 0.0
        self._now, self._before = self._zeros(), self._zeros()  # since the last `_RECENT`, and those
        self._uncounted: list[NDArray[np.float32]] = []
        self._room = _MOST_UNCOUNTED

    def is_of(self, manifest: Manifest) -> bool:
        """Whether these are counts of the engine that `manifest` describes."""
        return self.labels == manifest.labels and self._expected == _expected(manifest)

    def add(self, probabilities: NDArray[np.float32]) -> None:
        """Count a batch, shape `(images, classes)`; later, for that takes longer than an image's turn."""
        self._uncounted.append(probabilities)
        self._room -= probabilities.size
        if self._room < 0 or len(self._uncounted) == _MOST_BATCHES:
            self.settle()

    def settle(self) -> None:
        """Count what was added."""
        if not self._uncounted:
            return
        classes, confidence, total = count_predictions(np.concatenate(self._uncounted))
        self._uncounted.clear()
        self._room = _MOST_UNCOUNTED
        self.classes += classes
        self.confidence += confidence
        self.sum += total
        self._now = self._now[0] + classes, self._now[1] + confidence
        if self._now[0].sum() >= _RECENT:
            self._before, self._now = self._now, self._zeros()

    def merge(self, other: Predictions) -> None:
        """Count everything `other` counted, of an engine with the same labels."""
        self.settle()
        other.settle()
        self.classes = self.classes + other.classes
        self.confidence = self.confidence + other.confidence
        self.sum += other.sum
        self._now = self._now[0] + other._now[0], self._now[1] + other._now[1]
        self._before = self._before[0] + other._before[0], self._before[1] + other._before[1]

    @property
    def images(self) -> int:
        """Counted since start."""
        return int(self.classes.sum())

    def by_label(self) -> dict[str, int]:
        """Images since start by label: of the labels that are told apart, and of `OTHERS`."""
        names = [self.labels[number] for number in self._apart] + [OTHERS]
        counts: dict[str, int] = {}
        for name, count in zip(names, grouped(self.classes, self._apart).tolist(), strict=False):
            counts[name] = counts.get(name, 0) + count  # two classes may have one name
        return counts

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus buckets of the confidence: upper bound, images up to it."""
        sums = np.cumsum(self.confidence).tolist()
        return list(zip([*map(str, CONFIDENCES), "+Inf"], map(float, sums), strict=True))

    def drift(self) -> Mapping[str, float]:
        """The stability index of the recent images' `labels`, and of their `confidence`, where known."""
        if self._expected is None:
            return {}
        recent = self._now[0] + self._before[0], self._now[1] + self._before[1]
        expected = np.array(self._expected.classes), np.array(self._expected.confidence)
        indices = {"labels": stability_index(*(grouped(it, self._apart) for it in (expected[0], recent[0])))}
        if len(expected[1]) == len(recent[1]):  # else another version has counted in other bins
            indices["confidence"] = stability_index(expected[1], recent[1])
        return {name: index for name, index in indices.items() if index is not None}

    def _zeros(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros(len(self.labels), np.int64), np.zeros(len(CONFIDENCES) + 1, np.int64)


def _expected(manifest: Manifest) -> Expected | None:
    """What the engine said of the validation images, if that was recorded."""
    expected = None if manifest.evidence is None else manifest.evidence.predictions
    return expected if expected is not None and len(expected.classes) == len(manifest.labels) else None
