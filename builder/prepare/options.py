"""What can be chosen about the graphs, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from builder.kit import LONGEST_NAME
from builder.prepare.normalisations import NORMALISATIONS
from builder.prepare.ranges import Ranges
from models.folders import ON_DAMAGED_TEXT, OnDamaged
from models.preprocessing import Interpolation
from models.recipe import Training
from runtime.manifest import Activation

QAT: Final = Training(epochs=16, learning_rate=1e-3, weight_decay=0)


# Of networks from elsewhere alone.
FOREIGN: Final = (
    *("unlabelled", "preprocess", "resize", "interpolation", "image_size", "output_name", "activation"),
    *("labels", "allow_low_accuracy", "weights", "architecture"),
)


class PrepareOptions(BaseModel):
    """How a network becomes ONNX graphs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = Field(
        default=None,
        description="Data set whose training images calibrate INT8 and whose validation images judge the "
        "engines: digits, fashion-mnist, glyphs, or an ImageFolder directory; by default what the "
        "checkpoint was trained on.",
    )
    on_damaged: OnDamaged = Field(default="stop", description=ON_DAMAGED_TEXT)
    calibration: Literal["auto", "entropy", "max", "mse"] = Field(
        default="auto",
        description="How INT8 activation ranges are found; auto tries entropy, then max, then mse.",
    )
    correction: bool = Field(
        default=True,
        description="If INT8 fails the gate, equalise channels and correct biases.",
    )
    rounding: bool = Field(
        default=True,
        description="If INT8 still fails, round weights for the least error of each layer's output.",
    )
    calibration_images: int = Field(
        default=512, ge=1, description="Training images to calibrate with, at most."
    )
    verification_images: int = Field(
        default=1024, ge=1, description="Validation images to judge engines by, at most."
    )
    seed: int = Field(default=0, description="Selects the images.")
    sensitivity: bool = Field(
        default=True,
        description="If INT8 still fails, rank the layers by what quantising each costs, and keep those in "
        "higher precision that cost most for the time they take.",
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
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=LONGEST_NAME,
        description="Of the network, with which the packages' names begin; by default the checkpoint's, or "
        "the file's.",
    )
    unlabelled: bool = Field(
        default=False,
        description="The folders of --data are no classes: judge a model from elsewhere by agreement with "
        "FP32 alone.",
    )
    preprocess: str | None = Field(
        default=None,
        description=f"How a model from elsewhere normalises images: {', '.join(NORMALISATIONS)}; or a file: "
        "JSON with resize, mean and std, or what timm, Hugging Face or Paddle wrote; by default what the "
        "model says.",
    )
    resize: str | None = Field(
        default=None,
        pattern=r"^([1-9][0-9]*|squash|letterbox|none)$",
        description="How its images get their size: a number of pixels, which the shorter side becomes "
        "before the middle is cut out, or squash, letterbox or none; by default what --preprocess or the "
        "model says.",
    )
    interpolation: Interpolation | None = Field(
        default=None,
        description="How its images are resized: as in its training; by default what --preprocess or the "
        "model says, else auto, the fastest.",
    )
    image_size: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]*(x[1-9][0-9]*)?$",
        description="What an ONNX file takes, if it leaves that open: a side, or height and width, such as "
        "48x192.",
    )
    output_name: str | None = Field(
        default=None, description="Of an ONNX file's scores, if it has several outputs."
    )
    activation: Activation | None = Field(
        default=None,
        description="What makes probabilities of a model from elsewhere: softmax if one label is true of an "
        "image, sigmoid if any number may be; by default what the model does, else softmax.",
    )
    labels: Path | None = Field(
        default=None,
        description="File with the classes of a model from elsewhere, one a line in the order of its "
        "outputs; by default what the model says, else the data's folders.",
    )
    allow_low_accuracy: bool = Field(
        default=False,
        description="Take a model from elsewhere that is hardly ever right about the validation images.",
    )
    weights: str | None = Field(
        default=None,
        description="For torchvision:NAME and timm:NAME: a file of weights, or `pretrained` for the "
        "library's own.",
    )
    architecture: str | None = Field(
        default=None,
        description="What a file of weights is of: torchvision's name for it, or timm:NAME; by default what "
        "it says itself.",
    )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of `image_size`."""
        if self.image_size is None:
            return None
        height, _, width = self.image_size.partition("x")
        return int(height), int(width or height)

    @property
    def methods(self) -> Sequence[Ranges]:
        """Ways to calibrate, the preferred one first."""
        return get_args(Ranges) if self.calibration == "auto" else [self.calibration]

    @property
    def training(self) -> Training | None:
        """The quantisation-aware training that is asked for."""
        changes = {"epochs": self.qat_epochs, "learning_rate": self.qat_learning_rate}
        return QAT.model_copy(update=changes) if self.qat else None
