"""Whether a network from elsewhere can be right about the images it is judged by.

A wrong normalisation, wrong labels or labels in another order all show in the FP32 network's own accuracy.
An engine that repeats such a network perfectly would be published with wrong answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import ExportError
from builder.prepare.labels import natural_order

ABOVE_CHANCE: Final = 0.2  # share of the way from chance to perfection that a network must have made
REORDERED: Final = 0.4  # the same with the labels in another order, before that is blamed
FAR_BELOW: Final = 0.1  # of the accuracy with the labels in the best order
_IMAGES_A_CLASS: Final = 3  # fewer fit some order by chance


@dataclass(frozen=True)
class Alternative:
    """Another way to give the network its images, such as `--preprocess -1..1`, and its accuracy so."""

    option: str
    accuracy: float


def require_plausible(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    labels: Sequence[str],
    alternatives: Callable[[], Iterator[Alternative]],
) -> None:
    """Stop where the network knows hardly anything about the images, or knows it under other names.

    Args:
        logits: of the FP32 network for the images as they are, shape (N, classes).
        targets: their true classes, shape (N,).
        labels: of the classes.
        alternatives: tried only where the accuracy is too low.

    Raises:
        ExportError: that is so; the message says what to check.
    """
    found = logits.argmax(axis=1)
    accuracy = float(np.mean(found == targets))
    classes = np.unique(targets)
    # Of each class alike, so that naming the most frequent class always is no better than guessing.
    mean_recall = float(np.mean([np.mean(found[targets == each] == each) for each in classes]))
    chance = 1 / len(classes)
    advice = "or pass --allow-low-accuracy if that is as it should be"
    order, reordered = best_order(found, targets, logits.shape[1])
    enough = len(targets) >= _IMAGES_A_CLASS * len(classes)
    known = reordered >= chance + REORDERED * (1 - chance)
    if reordered - accuracy > FAR_BELOW and known and enough:
        raise ExportError(
            f"the network gets {accuracy:.0%} of your own images right, and would get {reordered:.0%} with "
            f"its labels in another order ({_told(order, labels)}). Name its classes with --labels FILE, one "
            f"a line in the order of its outputs, {advice}"
        )
    if mean_recall >= chance + ABOVE_CHANCE * (1 - chance):
        return
    better = max(alternatives(), key=lambda each: each.accuracy, default=None)
    hint = ""
    if better is not None and better.accuracy > accuracy + FAR_BELOW:
        hint = f" (with {better.option} it gets {better.accuracy:.0%})"
    raise ExportError(
        f"the network gets {mean_recall:.0%} of your own images right, as a mean of all classes, and "
        f"guessing gets {chance:.0%}: check --labels, --preprocess and --resize{hint}, {advice}"
    )


def best_order(
    found: NDArray[np.int64], targets: NDArray[np.int64], classes: int
) -> tuple[dict[int, int], float]:
    """The class that each output would have to stand for, where that changes it, and the accuracy then."""
    from scipy.optimize import linear_sum_assignment

    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (found, targets), 1)
    # Outputs that gain nothing elsewhere stay where they are.
    outputs, meant = linear_sum_assignment(
        confusion * 2 * classes + np.eye(classes, dtype=np.int64), maximize=True
    )
    right = int(confusion[outputs, meant].sum())
    moved = {
        int(output): int(target)
        for output, target in zip(outputs, meant, strict=True)
        if output != target and confusion[output, target]
    }
    return moved, right / len(targets)


def _told(order: dict[int, int], labels: Sequence[str]) -> str:
    natural = natural_order(labels)
    if natural != list(labels) and all(natural[output] == labels[target] for output, target in order.items()):
        return f"as numbers count: {', '.join(natural[:4])}, ..."
    pairs = [f"output {output} is {labels[target]}" for output, target in sorted(order.items())]
    return ", ".join(pairs[:3]) + (", ..." if len(pairs) > 3 else "")
