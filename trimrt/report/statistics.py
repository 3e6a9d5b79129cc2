"""The two figures of the report that are not simple counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

_Z: Final = 1.959963984540054  # 97.5 % quantile of the normal distribution: a 95 % interval


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """95 % interval of a share, as shares (Wilson 1927, https://doi.org/10.2307/2276774).

    Args:
        right: how many of `images`.
        images: at least one.
    """
    share, spread = right / images, _Z * _Z / images
    centre = share + spread / 2
    reach = _Z * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    # The ends are 0 and 1 exactly where all or none are right, but for rounding.
    low = 0.0 if right == 0 else (centre - reach) / (1 + spread)
    high = 1.0 if right == images else (centre + reach) / (1 + spread)
    return low, high


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats, by rising cost.

    A point is beaten by one that costs no more and gains no less, and is better in one of the two.
    """
    order = sorted(range(len(costs)), key=lambda index: (costs[index], -gains[index], index))
    front: list[int] = []
    for index in order:
        if (
            not front
            or gains[index] > gains[front[-1]]
            or (costs[index], gains[index]) == (costs[front[-1]], gains[front[-1]])
        ):
            front.append(index)
    return front
