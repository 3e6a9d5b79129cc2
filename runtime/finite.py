"""Are an engine's outputs numbers? Checked for every batch, so it has to be quick."""

from __future__ import annotations

import math
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Outputs
from runtime.manifest import EngineError

Floats: TypeAlias = NDArray[np.float32]

NOT_FINITE: Final = "the engine gave NaN or infinite logits"


def all_finite(logits: Floats, probabilities: Floats) -> bool:
    """Whether there is no NaN and no infinity in two arrays of the same shape."""
    # One anywhere makes the sum of products one too, since infinity times zero is NaN.
    product = np.vdot(logits, probabilities)
    return math.isfinite(product) or bool(finite_rows(logits, probabilities).all())


def finite_rows(logits: Floats, probabilities: Floats) -> NDArray[np.bool_]:
    """For each image, whether both of its rows are finite; shape `(count,)` of two `(count, classes)`."""
    finite: NDArray[np.bool_] = np.all(np.isfinite(logits) & np.isfinite(probabilities), axis=1)
    return finite


def check_finite(outputs: Outputs) -> None:
    """Refuse an engine that computes no numbers.

    Raises:
        EngineError: there is a NaN or an infinity in `outputs`.
    """
    if not all_finite(outputs.logits, outputs.probabilities):
        raise EngineError(NOT_FINITE)
