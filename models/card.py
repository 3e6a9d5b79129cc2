"""The model card: what a checkpoint is, in JSON, enough to rebuild the network without pickle.

A checkpoint is a folder with `student.safetensors` (weights) and `card.json` (this). This module
imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import TrimRTError, faults
from models.files import restore
from models.preprocessing import Preprocessing
from models.promise import Promise

CARD_NAME: Final = "card.json"
WEIGHTS_NAME: Final = "student.safetensors"

Role = Literal["teacher", "student", "pruned"]


class CheckpointError(TrimRTError):
    """A checkpoint folder that cannot be used; the message says what is wrong and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Strict):
    """What the model was trained on, and which part was held out."""

    name: str = Field(description="`digits`, `fashion-mnist`, `glyphs`, or the folder's name")
    source: str = Field(description="what `models.datasets.open_dataset` finds it by: a name or a folder")
    sha256: str = Field(description="hash over the sorted relative paths and contents of all images")
    fold: int | None = Field(
        default=None, description="held-out fold; None when the data came with a test part"
    )
    folds: int | None = None
    split: str = Field(
        description="how train and test were parted, e.g. `stratified 5-fold, shuffled, seed 42`"
    )
    train_images: int
    validation_images: int
    test_images: int
    damaged_files: int = Field(default=0, description="files that could not be read, and were left out")


class Metrics(_Strict):
    """Measured on the test images, in FP32, by the evaluation in this repository."""

    accuracy: float = Field(ge=0, le=1, description="top-1, as a share")
    validation_accuracy: float = Field(ge=0, le=1, description="top-1 on the validation images")
    loss: float = Field(ge=0, description="mean cross-entropy, nats")
    wrong: int = Field(ge=0, description="misclassified test images")
    images: int = Field(ge=1)
    parameters: int = Field(ge=1)
    macs: int = Field(ge=1, description="multiply-accumulates for one image at the card's input size")
    live_parameters: float = Field(ge=0, le=1, description="share of parameters that receive a gradient")


class Ancestor(_Strict):
    """A checkpoint that another was made from."""

    name: str
    role: Literal["teacher", "student"]
    architecture: str
    weights_sha256: str
    metrics: Metrics


class Card(_Strict):
    """One checkpoint's description; `card.json`."""

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=128, description="e.g. `digits-resnet18`")
    role: Role
    architecture: str = Field(description="torchvision classifier, e.g. `resnet18`, or `timm:NAME`")
    stem: Literal["standard", "small"] = Field(
        description="`small`: the first convolution (7x7, stride 2) is replaced by 3x3, stride 1"
    )
    channel_plan: dict[str, dict[str, int]] | None = Field(
        default=None,
        description="module name to the sizes that differ from the unpruned network "
        "(in_channels, out_channels, groups, num_features, in_features, out_features)",
    )
    labels: list[str] = Field(min_length=2)
    preprocessing: Preprocessing
    dataset: Dataset
    metrics: Metrics
    promise: Promise | None = Field(
        default=None, description="what it was pruned to cost; None: it was given no budget"
    )
    seed: int
    recipe: dict[str, Any] = Field(description="every setting of the run that made it")
    command: str = Field(description="the command that made it")
    weights_sha256: str = Field(default="", description="filled in when the checkpoint is written")
    lineage: list[Ancestor] = Field(
        default=[],
        description="what this was made from, the first first: so a student shipped alone tells all",
    )
    versions: dict[str, str] = Field(description="of trimrt and the libraries that trained it")


def read_card(folder: Path) -> Card:
    """The card of the checkpoint in `folder`.

    Raises:
        CheckpointError: no card there, or not a valid one.
    """
    restore(folder)
    path = folder / CARD_NAME
    try:
        return Card.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {CARD_NAME} (`trimrt compress` writes one)"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a valid model card: {error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a valid model card: {faults(error)}") from error
