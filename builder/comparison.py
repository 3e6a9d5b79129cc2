"""An engine or a graph beside the network that it was made from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Beside its reference, over the same images; shares are of 1.

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

    @property
    def told_images(self) -> str:
        """How many images, in words."""
        if self.images == self.originals:
            return f"{self.images} images"
        return f"{self.originals} images in {self.images // self.originals} positions"
