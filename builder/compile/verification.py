"""The accuracy gate: compares a compiled engine with the network it was made from, on held-out images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builder.kit import VerificationSet
from models.errors import TrimRTError
from models.preprocessing import Pixels
from runtime.engine import Engine
from runtime.manifest import Activation


class GateError(TrimRTError):
    """An engine that is too far from its reference to be published."""


@dataclass(frozen=True)
class Comparison:
    """An engine beside its reference, over the same images; shares are of 1.

    Attributes:
        images: how many, shifted copies among them.
        originals: how many of them are as they are.
        reference_top1: share of the originals that the reference labels rightly; None: nobody knows.
        engine_top1: share of the originals that the engine labels rightly; None: nobody knows.
        drop: top-1 accuracy that the engine loses over all images; None: nobody knows.
        label_agreement: share of all images that both label alike, rightly or not. Where an image has any
            number of labels, all of them have to be alike.
        max_logit_difference: largest absolute difference of any logit.
    """

    images: int
    originals: int
    reference_top1: float | None
    engine_top1: float | None
    drop: float | None
    label_agreement: float
    max_logit_difference: float


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
            raise GateError(f"{'; '.join(faults)}; measured on {told_images(comparison)}")


def compare(engine: Engine, images: VerificationSet) -> Comparison:
    """Run `engine` over `images` and hold it against the reference.

    Raises:
        EngineError: the engine failed.
    """
    return compare_logits(engine_logits(engine, images.pixels), images, engine.manifest.activation)


def compare_logits(
    logits: NDArray[np.float32], images: VerificationSet, activation: Activation = "softmax"
) -> Comparison:
    """The same for logits of all `images`, shape (N, classes)."""
    labels, reference = logits.argmax(axis=1), images.logits.argmax(axis=1)
    if activation == "softmax":
        alike = labels == reference
    else:
        alike = ((logits > 0) == (images.logits > 0)).all(axis=1)
    right, reference_right = labels == images.targets, reference == images.targets
    known = images.labelled
    return Comparison(
        images=len(logits),
        originals=images.originals,
        reference_top1=float(np.mean(reference_right[: images.originals])) if known else None,
        engine_top1=float(np.mean(right[: images.originals])) if known else None,
        drop=float(np.mean(reference_right) - np.mean(right)) if known else None,
        label_agreement=float(np.mean(alike)),
        max_logit_difference=float(np.abs(logits - images.logits).max()),
    )


def told_images(comparison: Comparison) -> str:
    """How many images, in words."""
    if comparison.images == comparison.originals:
        return f"{comparison.images} images"
    return f"{comparison.originals} images in {comparison.images // comparison.originals} positions"


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
