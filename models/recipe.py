"""Every setting of a compression run: one model behind the TOML file, the command line and the card."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.cores import cores
from models.errors import TrimRTError
from models.promise import Kind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


TrainingPrecision = Literal["fp32", "bf16"]

DistillationLoss = Literal["kl", "dist", "labels"]


class RecipeError(TrimRTError):
    """Settings that are not valid; the message names each of them."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Image(_Section):
    """What the networks see."""

    size: int | None = Field(
        default=None, ge=8, le=1024, description="side of the input, in pixels; by default the images' own, "
        "at least 24, and 224 for images of 96 and more (on a CPU 128)",
    )  # fmt: skip
    stem: Literal["auto", "standard", "small"] = Field(
        default="auto",
        description="first convolution; small (3x3, stride 1) is chosen for inputs under 96 pixels",
    )


class Augmentation(_Section):
    """How training images are varied, each drawn uniformly up to these limits."""

    rotation: float = Field(default=12.0, ge=0, le=180, description="degrees to either side")
    scale: float = Field(default=0.12, ge=0, lt=1, description="share of the size, up and down")
    shear: float = Field(default=0.1, ge=0, le=1, description="slant, as a tangent")
    shift: float = Field(default=0.06, ge=0, le=1, description="share of the width, in both directions")
    flip: bool | None = Field(
        default=None,
        description="mirror half of the images; by default only at 96 pixels and more, which photos have",
    )


class Training(_Section):
    """One network's training: AdamW with a one-cycle schedule."""

    epochs: int = Field(ge=0, description="passes over the training images")
    learning_rate: float = Field(gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(
        default=0.05, ge=0, description="AdamW's, on weights but not on biases and norms"
    )
    batch_size: int = Field(default=64, ge=2, description="images per step")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many epochs without a lower validation loss, and keep the best",
    )


class Teacher(Training):
    """The large network that the student learns from."""

    architecture: str = Field(default="resnet50", description="torchvision classifier, or timm:NAME")
    weights: Path | None = Field(
        default=None,
        description="start from the weights in this file; with 0 epochs they are kept as they are",
    )
    epochs: int = Field(default=40, ge=0, description="passes over the training images")
    learning_rate: float = Field(default=1.5e-3, gt=0, description="peak of the one-cycle schedule")


class Student(Training):
    """The small network."""

    architecture: str = Field(default="resnet18", description="torchvision classifier, or timm:NAME")
    epochs: int = Field(default=32, ge=1, description="passes over the training images")
    learning_rate: float = Field(default=2e-3, gt=0, description="peak of the one-cycle schedule")


class Distillation(_Section):
    """How the student and every fine-tuning learn from the teacher."""

    loss: DistillationLoss = Field(
        default="kl", description="kl: divergence from the teacher's outputs (Hinton et al. 2015); "
        "dist: correlation with them (Huang et al. 2022); labels: the true labels alone",
    )  # fmt: skip
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="kl: share of the true labels in the loss; the teacher has the rest",
    )
    temperature: float = Field(default=4.0, gt=0, description="softens the outputs of both networks")
    views: int = Field(
        default=24, ge=1, description="augmented copies of the training images that the teacher labels once"
    )


class Pruning(Training):
    """Which channels go, and the fine-tuning afterwards."""

    ratio: float = Field(default=0.1, ge=0, lt=1, description="share of the channels to remove")
    target_parameters: float | None = Field(
        default=None,
        gt=0,
        description="find the ratio that leaves this many parameters; below 1: a share of the student's",
    )
    target_macs: float | None = Field(
        default=None,
        gt=0,
        description="find the ratio that leaves this many multiply-accumulates; below 1: a share",
    )
    scope: Literal["local", "global"] = Field(
        default="local", description="rank channels within their layer, or across the network"
    )
    round_to: int = Field(
        default=16, ge=1, description="channel counts become multiples of this; 1 leaves them"
    )
    weights: Literal["kept", "random"] = Field(
        default="kept",
        description="of the channels that stay; random draws new ones, to show what keeping them is worth",
    )
    steps: int = Field(
        default=1, ge=1, le=100, description="prune in this many steps, each followed by a fine-tuning"
    )
    epochs: int = Field(default=12, ge=0, description="passes over the training images after each step")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak of the one-cycle schedule")


class Recipe(_Section):
    """A whole run. The same recipe, data and machine give the same weights, bit for bit."""

    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of weights, shuffling and augmentation")
    threads: int = Field(
        default_factory=cores,
        ge=1,
        description="CPU threads; other numbers give other weights",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto is CUDA where there is a GPU"
    )
    precision: TrainingPrecision | Literal["auto"] = Field(
        default="auto",
        description="of convolutions while training; auto is bf16 where the processor computes in it. "
        "Networks are always measured in FP32",
    )
    latency_ms: float | None = Field(
        default=None,
        gt=0,
        description="prune to the widths that keep the most within this time of a batch (--latency-table)",
    )
    size_mb: float | None = Field(
        default=None, gt=0, description="the same within this size of the engine's weights, in megabytes"
    )
    macs: float | None = Field(
        default=None, gt=0, description="the same within so many multiply-accumulates for one image"
    )
    front: int = Field(
        default=1, ge=1, le=20, description="keep so many networks on the way there, of falling cost"
    )
    image: Image = Image()
    augmentation: Augmentation = Augmentation()
    teacher: Teacher = Teacher()
    student: Student = Student()
    distillation: Distillation = Distillation()
    pruning: Pruning = Pruning()

    @property
    def budget(self) -> dict[Kind, float]:
        """What the pruned network may cost; empty where `pruning` says how much is pruned."""
        wanted: dict[Kind, float | None] = {
            "latency_ms": self.latency_ms,
            "size_mb": self.size_mb,
            "macs": self.macs,
        }
        return {kind: most for kind, most in wanted.items() if most is not None}

    @property
    def pruning_steps(self) -> int:
        """How many times channels are pruned, each followed by a fine-tuning."""
        return self.front * self.pruning.steps


Settings = dict[str, Any]

PRESETS: Final[dict[str, tuple[str, Settings]]] = {
    "aligned": ("10 % of the channels, rounded to multiples of 16: a quarter fewer parameters (default)", {}),
    "report": ("10 % of the channels, unaligned, as in the report that began this project",
               {"pruning": {"round_to": 1}}),
    "aggressive": ("75 % of the channels: a sixteenth of the parameters, fine-tuned for longer",
                   {"pruning": {"ratio": 0.75, "epochs": 60, "learning_rate": 3e-3}}),
    "quick": ("a few epochs, to try things out",
              {"teacher": {"epochs": 8}, "student": {"epochs": 8}, "distillation": {"views": 8},
               "pruning": {"epochs": 4}}),
}  # fmt: skip


def make_recipe(
    *, preset: str = "aligned", file: Path | None = None, overrides: Settings | None = None
) -> Recipe:
    """The preset, changed by the TOML file, changed by `overrides` (nested as the recipe is).

    Raises:
        RecipeError: an unknown preset, an unreadable file, or values that are not valid.
    """
    if preset not in PRESETS:
        raise RecipeError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    settings: Settings = {}
    for layer in (PRESETS[preset][1], _read_toml(file) if file else {}, overrides or {}):
        settings = _merge(settings, layer)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}, not {problem['input']!r}"
            if problem["type"] != "extra_forbidden"
            else f"{'.'.join(map(str, problem['loc']))}: there is no such setting"
            for problem in error.errors()
        ]
        raise RecipeError("\n".join(lines)) from None


def as_options(values: BaseModel, *defaults: BaseModel) -> list[str]:
    """The command line's options that turn any of `defaults` into `values`; all are of one class."""
    return list(_options(values, defaults, "-"))


def _options(values: BaseModel, defaults: Sequence[BaseModel], prefix: str) -> Iterator[str]:
    for name, value in values:
        flag = f"{prefix}-{name.replace('_', '-')}"
        others = [getattr(default, name) for default in defaults]
        if isinstance(value, BaseModel):
            yield from _options(value, others, flag)
        elif all(value == other for other in others):
            continue
        elif isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        else:
            yield from (flag, str(value))


def _read_toml(file: Path) -> Settings:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error


def _merge(below: Settings, above: Settings) -> Settings:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
