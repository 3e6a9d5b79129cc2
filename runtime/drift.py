"""How far what an engine says of live images is from what it said of the validation images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

CONFIDENCES: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999)
"""Upper bounds of the bins of confidence, but for the last, which ends at 1; most networks are sure."""

LEAST_IMAGES: Final = 100
"""Of fewer, chance alone makes a large index."""

_TOLD_APART: Final = 20  # classes, the rest among them: the more there are, the more is chance


def count_predictions(
    probabilities: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Count images by their likeliest class, and by its probability.

    Args:
        probabilities: shape `(images, classes)`.

    Returns:
        Images by class, shape `(classes,)`; images by confidence, one more than there are `CONFIDENCES`; and
        the sum of the confidences.
    """
    confidence = probabilities.max(axis=1)
    bins = np.searchsorted(np.array(CONFIDENCES, np.float32), confidence)
    classes = np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1])
    return classes, np.bincount(bins, minlength=len(CONFIDENCES) + 1), float(confidence.sum())


def classes_apart(expected: Sequence[int] | None, classes: int) -> NDArray[np.int64]:
    """The classes that are told apart: all, or the most frequent of many; the others count as one.

    Args:
        expected: images of the validation set by class; None: nobody knows, and the first are taken.
        classes: how many there are.

    Returns:
        Their numbers, rising.
    """
    if classes <= _TOLD_APART:
        return np.arange(classes)
    if expected is None:
        return np.arange(_TOLD_APART - 1)
    order = np.argsort(-np.array(expected), kind="stable")
    picked: NDArray[np.int64] = np.sort(order[: _TOLD_APART - 1])
    return picked


def grouped(counts: NDArray[np.int64], apart: NDArray[np.int64]) -> NDArray[np.int64]:
    """The counts of the classes `apart`, and behind them that of all others, if there are any."""
    picked = counts[apart]
    return picked if len(apart) == len(counts) else np.append(picked, counts.sum() - picked.sum())


def stability_index(expected: NDArray[np.int64], observed: NDArray[np.int64]) -> float | None:
    """The population stability index of two histograms with the same bins.

    Below 0.1 they are alike, beyond 0.25 they are not. Half an image is added to each bin: an empty one would
    make the index infinite.

    Returns:
        None where either has fewer than `LEAST_IMAGES`.
    """
    if min(expected.sum(), observed.sum()) < LEAST_IMAGES:
        return None
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (expected, observed))
    return float(((q - p) * np.log(q / p)).sum())
