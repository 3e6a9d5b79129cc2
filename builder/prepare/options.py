"""What can be chosen about the graphs, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from builder.prepare.import_onnx import NORMALISATIONS
from builder.prepare.int8 import METHODS, Method
from models.recipe import Training

QAT: Final = Training(epochs=16, learning_rate=1e-3, weight_decay=0)


class PrepareOptions(BaseModel):
    """How a network becomes ONNX graphs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = Field(
        default=None,
        description="Data set whose training images calibrate INT8 and whose validation images judge the "
        "engines: digits, fashion-mnist, or an ImageFolder directory; by default what the checkpoint was "
        "trained on.",
    )
    calibration: Literal["auto", "entropy", "max"] = Field(
        default="auto", description="How INT8 activation ranges are found; auto tries entropy, then max."
    )
    calibration_images: int = Field(
        default=512, ge=1, description="Training images to calibrate with, at most."
    )
    verification_images: int = Field(
        default=1024, ge=1, description="Validation images to judge engines by, at most."
    )
    seed: int = Field(default=0, description="Selects the images.")
    sensitivity: bool = Field(
        default=False,
        description="Rank the layers by what quantising each costs; if INT8 fails the gate, keep the "
        "costliest in higher precision.",
    )
    qat: bool = Field(
        default=False,
        description="If INT8 fails the gate in every other way, fine-tune the network for it "
        "(quantisation-aware training), which takes about as long as training did.",
    )
    qat_epochs: int = Field(default=QAT.epochs, ge=1, description="Passes over the training images.")
    qat_learning_rate: float = Field(
        default=QAT.learning_rate,
        gt=0,
        description="Peak of the one-cycle schedule; lower for large networks that took long to train.",
    )
    preprocess: str | None = Field(
        default=None,
        description=f"How a model from elsewhere normalises images: {', '.join(NORMALISATIONS)}, or a JSON "
        "file with resize, mean and std; by default what the model says.",
    )
    labels: Path | None = Field(
        default=None,
        description="File with the classes of a model from elsewhere, one a line; by default the data's.",
    )
    weights: str | None = Field(
        default=None,
        description="For torchvision:NAME and timm:NAME: a state dict's file, or `pretrained` for the "
        "library's own.",
    )

    @property
    def methods(self) -> Sequence[Method]:
        """Ways to calibrate, the preferred one first."""
        return METHODS if self.calibration == "auto" else [self.calibration]

    @property
    def training(self) -> Training | None:
        """The quantisation-aware training that is asked for."""
        changes = {"epochs": self.qat_epochs, "learning_rate": self.qat_learning_rate}
        return QAT.model_copy(update=changes) if self.qat else None
