"""What can be chosen about a build, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from builder.compile.targets.tensorrt.options import TensorRTOptions
from builder.compile.verification import Gate
from models.recipe import Training
from runtime.manifest import Backend, BatchSizes, Precision

QAT: Final = Training(epochs=16, learning_rate=1e-3, weight_decay=0)


@dataclass(frozen=True)
class PrepareOptions:
    """How a network becomes ONNX graphs.

    Attributes:
        data: data set whose training images calibrate INT8 and whose validation images judge the engines:
            `digits`, `fashion-mnist` or an ImageFolder directory; None: what the checkpoint was trained on.
        calibration: how INT8 activation ranges are found; `auto` tries entropy, then max.
        calibration_images: training images to calibrate with, at most.
        verification_images: validation images to judge engines by, at most.
        seed: selects the images.
        sensitivity: rank the layers by what quantising each costs; if INT8 fails the gate, keep the costliest
            in higher precision.
        qat: if INT8 fails the gate in every other way, fine-tune the network for it.
        qat_epochs: passes over the training images.
        qat_learning_rate: peak of the one-cycle schedule.
        preprocess: how a model from elsewhere normalises images: a name or a JSON file; None: what the model
            says.
        labels: text file with the classes of a model from elsewhere, one a line; None: the data's.
        weights: for `torchvision:NAME` and `timm:NAME`: a state dict's file, or `pretrained`.
    """

    data: str | None = None
    calibration: Literal["auto", "entropy", "max"] = "auto"
    calibration_images: int = 512
    verification_images: int = 1024
    seed: int = 0
    sensitivity: bool = False
    qat: bool = False
    qat_epochs: int = QAT.epochs
    qat_learning_rate: float = QAT.learning_rate
    preprocess: str | None = None
    labels: Path | None = None
    weights: str | None = None


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
