"""The accuracy gate: compares a compiled engine with the network it was made from, on held-out images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builder.comparison import Comparison
from builder.kit import VerificationSet
from models.errors import TrimRTError
from models.preprocessing import Pixels
from runtime.drift import count_predictions
from runtime.engine import Engine
from runtime.manifest import Activation, Predictions


class GateError(TrimRTError):
    """An engine that is too far from its reference to be published."""


@dataclass(frozen=True)
class Gate:
    """What an engine may lose and still be published.

    Attributes:
        max_drop: of top-1 accuracy, as a share (0.005 is half a point).
        min_agreement: share of images that engine and reference label alike.
    """

    max_drop: float = 0.005
    min_agreement: float = 0.98

    def check(self, comparison: Comparison) -> None:
        """Pass, or say what is wrong.

        Raises:
            GateError: the engine is beyond a limit.
        """
        faults = []
        # The shares are rounded quotients; NaN fails too.
        if comparison.drop is not None and not comparison.drop <= self.max_drop + 1e-9:
            faults.append(
                f"top-1 falls by {100 * comparison.drop:.2f} points (at most {100 * self.max_drop:g} allowed)"
            )
        if not comparison.label_agreement >= self.min_agreement - 1e-9:
            faults.append(
                f"it agrees with FP32 on {comparison.label_agreement:.2%} of the labels "
                f"(at least {self.min_agreement:.2%} required)"
            )
        if faults:
            raise GateError(f"{'; '.join(faults)}; measured on {comparison.told_images}")


def compare(engine: Engine, images: VerificationSet) -> Comparison:
    """Run `engine` over `images` and hold it against the reference.

    Raises:
        EngineError: the engine failed.
    """
    return images.compare(engine_logits(engine, images.pixels), engine.manifest.activation)


def predictions_of(logits: NDArray[np.float32], activation: Activation) -> Predictions:
    """What these logits, shape (N, classes), say of the images."""
    wide = logits.astype(np.float64)
    if activation == "softmax":
        exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    else:
        probabilities = 1 / (1 + np.exp(-wide))
    classes, confidence, _ = count_predictions(probabilities.astype(np.float32))
    return Predictions(classes=classes.tolist(), confidence=confidence.tolist())


def engine_logits(engine: Engine, pixels: Pixels) -> NDArray[np.float32]:
    """The engine's logits of uint8 NHWC `pixels`, in batches as large as it takes; shape (N, classes).

    Raises:
        EngineError: the engine failed.
    """
    batch = engine.manifest.batch
    parts = []
    with closing(engine.open_slot()) as slot:
        for start in range(0, len(pixels), batch.max):
            part = pixels[start : start + batch.max]
            slot.pixels[: len(part)] = part
            # A fixed batch size is padded; the padding's outputs are cut off.
            outputs = slot.infer(max(len(part), batch.min))
            parts.append(outputs.logits[: len(part)].copy())
    return np.concatenate(parts)
