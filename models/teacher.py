"""A network that is there already, to distil from instead of training a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.card import Ancestor, Metrics
from models.datasets import DataSplit, ImageSet
from models.evaluation import Score, images_at_once, normalise, score, to_float
from models.networks import NetworkError
from models.preprocessing import Preprocessing

_ABOVE_CHANCE: Final = 0.2  # share of the way from guessing to perfection that a teacher must have made


@dataclass(frozen=True)
class ReadyTeacher:
    """A trained network of any origin.

    Attributes:
        name: to call it by.
        architecture: what it is, in a word.
        sha256: of its file.
        preprocessing: how images become its input.
        logits: of normalised images, float32 of shape (n, 3, H, W) on any device; shape (n, outputs).
        outputs_of: which of its outputs stand for some classes; it raises a `TrimRTError` if none do.
        parameters: in its weights.
        macs: multiply-accumulates for one image.
    """

    name: str
    architecture: str
    sha256: str
    preprocessing: Preprocessing
    logits: Callable[[Tensor], Tensor]
    outputs_of: Callable[[Sequence[str]], NDArray[np.int64]]
    parameters: int
    macs: int

    def limited_to(self, labels: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Its logits of these classes alone, in their order."""
        outputs = torch.from_numpy(self.outputs_of(labels))

        def logits(images: Tensor) -> Tensor:
            return self.logits(images)[:, outputs.to(images.device)]

        return logits


def measure(teacher: ReadyTeacher, data: DataSplit, device: torch.device) -> Ancestor:
    """What a student's card says of its teacher.

    Raises:
        NetworkError: it knows hardly anything about the images.
        TrimRTError: it does not know the data's classes.
    """
    validation, test = (_score(teacher, images, device) for images in (data.validation, data.test))
    chance = 1 / len(data.labels)
    if validation.accuracy < chance + _ABOVE_CHANCE * (1 - chance):
        raise NetworkError(
            f"the teacher {teacher.name} gets {validation.accuracy:.0%} of the validation images right, and "
            f"guessing gets {chance:.0%}: check how it takes images (--teacher-preprocess, --teacher-resize) "
            "and which class each of its outputs is (--teacher-labels)"
        )
    return Ancestor(
        name=teacher.name,
        role="teacher",
        architecture=teacher.architecture,
        weights_sha256=teacher.sha256,
        metrics=Metrics(
            **asdict(test),
            validation_accuracy=validation.accuracy,
            parameters=teacher.parameters,
            macs=teacher.macs,
            live_parameters=1.0,
        ),
    )


@torch.inference_mode()
def _score(teacher: ReadyTeacher, images: ImageSet, device: torch.device) -> Score:
    spec = teacher.preprocessing
    logits_of, size = teacher.limited_to(images.labels), images_at_once(spec, device)
    pixels = images.load_pixels(spec, progress=False)
    batches = [
        logits_of(normalise(to_float(pixels[start : start + size], device), spec)).float().cpu()
        for start in range(0, len(pixels), size)
    ]
    return score(torch.cat(batches), images.targets)
