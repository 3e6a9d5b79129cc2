"""Classes in the order of their logits."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_FEW: Final = 10  # picked one by one they take less time than sorting all of a thousand classes


def ranked(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The first classes by falling logit, equal ones by number.

    The same as `np.argsort(-logits, axis=1, kind="stable")[:, :count]` in much less time, and touching less
    memory, which under load is out of the processor's caches.

    Args:
        logits: shape `(images, classes)`, no NaN among them. By these, for a sure network's probabilities
            round to ties.
        count: how many classes of each image, `classes` at most.

    Returns:
        Shape `(images, count)`.
    """
    return _picked(logits, count) if count <= _FEW else _sorted(logits)[:, :count]


def _picked(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The greatest of each row, the first where some are equal, then of what is left, and so on."""
    left = logits.copy()
    rows = np.arange(len(logits))
    picked = np.empty((len(logits), count), np.int64)
    for place in range(count):
        if place:
            left[rows, picked[:, place - 1]] = -np.inf
        picked[:, place] = left.argmax(axis=1)
    last = left[rows[:, None], picked[:, -1:]]
    return picked if (last > -np.inf).all() else _sorted(logits)[:, :count]  # it may have been picked before


def _sorted(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """All classes.

    NumPy sorts integers with the processor's vectors, but not stably, so each carries its class in its lower
    half.
    """
    bits = (logits + np.float32(0)).view(np.int32)  # adding zero makes -0 the same as 0
    # IEEE 754: as integers, floats are in their order, but the negative ones in the reverse.
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = falling.astype(np.int64)
    keys <<= 32
    keys |= np.arange(logits.shape[1])
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys
