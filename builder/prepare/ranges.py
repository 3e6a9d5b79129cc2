"""Activation ranges by least square error: what is cut off, and what rounding in larger steps costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from builder.prepare.qdq import watch
from builder.weights import LEVELS
from models.preprocessing import Pixels

if TYPE_CHECKING:
    import onnx

Ranges = Literal["entropy", "max", "mse"]  # the first two are ModelOpt's

_BINS: Final = 2048
_SHARES: Final = np.linspace(0.2, 1, 81)  # of the largest magnitude, which are tried as range


def least_error_scales(model: onnx.ModelProto, tensors: Sequence[str], pixels: Pixels) -> dict[str, float]:
    """The scale of each tensor with which INT8 is nearest to its values, in mean square.

    Args:
        model: an FP32 graph.
        tensors: within it.
        pixels: training images, uint8 NHWC.
    """
    largest = dict.fromkeys(tensors, 0.0)
    for values in watch(model, tensors, pixels):
        for name, value in values.items():
            largest[name] = max(largest[name], float(np.abs(value).max()))
    counts = {name: np.zeros(_BINS) for name in tensors}
    for values in watch(model, tensors, pixels):
        for name, value in values.items():
            if largest[name] > 0:
                counts[name] += np.histogram(np.abs(value), _BINS, (0, largest[name]))[0]
    return {name: _scale(counts[name], largest[name]) for name in tensors}


def _scale(counts: NDArray[np.float64], largest: float) -> float:
    """The best scale for magnitudes that are counted in equal bins from 0 to `largest`."""
    if not largest > 0:
        return 1 / LEVELS
    magnitudes = (np.arange(_BINS) + 0.5) / _BINS * largest
    scales = _SHARES * largest / LEVELS
    rounded = np.minimum(np.rint(magnitudes / scales[:, None]), LEVELS) * scales[:, None]
    errors = (counts * np.square(magnitudes - rounded)).sum(axis=1)
    return float(scales[errors.argmin()])
