"""Symmetric integer weights with one scale for each output channel, which every target accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS: Final = 127  # on either side of zero; -128 is not used
SMALLEST_SCALE: Final = float(np.finfo(np.float32).tiny)  # of a channel that is all zeros


class IntegerWeights(NamedTuple):
    """Weights as integers and scales; `integers * scale` approximates the weights.

    Attributes:
        integers: INT8, of the weights' shape.
        scale: float32, of the same rank, 1 along every axis that shares a scale.
    """

    integers: NDArray[np.int8]
    scale: NDArray[np.float32]


def quantise(
    weights: NDArray[np.floating[Any]],
    *,
    axes: Sequence[int] = (0,),
    levels: int = LEVELS,
    smallest_scale: float = SMALLEST_SCALE,
) -> IntegerWeights:
    """Round weights to `levels` steps on either side of zero, the largest magnitude to the last step.

    Args:
        weights: float, of any shape.
        axes: along which every position has a scale of its own, such as the output channels.
        levels: at most 127.
        smallest_scale: lower bound of the scales, so that they do not become 0 in a smaller type.
    """
    shared = tuple(axis for axis in range(weights.ndim) if axis not in axes)
    largest = np.abs(weights).max(axis=shared, keepdims=True, initial=0)
    return round_to_scale(weights, np.maximum(largest / levels, smallest_scale))


def round_to_scale(weights: NDArray[np.floating[Any]], scale: NDArray[np.floating[Any]]) -> IntegerWeights:
    """Round weights to whole multiples of `scale`, which is 1 along every axis that shares one."""
    scale = scale.astype(np.float32)
    return IntegerWeights(np.clip(np.rint(weights / scale), -LEVELS, LEVELS).astype(np.int8), scale)
