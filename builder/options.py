"""What can be chosen about a build, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from builder.compile.targets.tensorrt.options import TensorRTOptions
from builder.compile.verification import Gate
from builder.prepare.import_onnx import NORMALISATIONS
from models.recipe import Training
from runtime.manifest import Backend, BatchSizes, Precision

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


@dataclass(frozen=True)
class BuildOptions:
    """How engine packages are built.

    Attributes:
        precisions: one package each; `best` is the faster one of INT8 and FP16 (FP32 for OpenVINO) that
            passes the gate.
        target: compiler; `auto` is TensorRT where it and a GPU are, else OpenVINO.
        batch: batch sizes to compile for.
        gate: what an engine may lose and still be published.
        tensorrt: for TensorRT's builder.
        prepare: how the graphs are made. A build kit has its graphs already and takes only the defaults.
    """

    precisions: Sequence[Precision | Literal["best"]] = ("int8",)
    target: Backend | Literal["auto"] = "auto"
    batch: BatchSizes = field(default_factory=lambda: BatchSizes(min=1, opt=8, max=32))
    gate: Gate = field(default_factory=Gate)
    tensorrt: TensorRTOptions = field(default_factory=TensorRTOptions)
    prepare: PrepareOptions = field(default_factory=PrepareOptions)
