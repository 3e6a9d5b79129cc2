"""What the stages of a compression run share: images, input size, device, and the teacher's views."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from torch import Tensor, nn

from models.checkpoint import load_checkpoint
from models.datasets import DataSplit, ImageSet
from models.defaults import PHOTO_SIDE
from models.distillation import TeacherViews, label_views, load_logits
from models.estimate import RunProgress
from models.evaluation import live_parameters
from models.inputs import choose_inputs
from models.networks import NetworkError, Stem
from models.preprocessing import Pixels, Preprocessing
from models.recipe import Augmentation, Recipe, TrainingPrecision
from models.teacher import ReadyTeacher
from models.training import Images, derive_seed, supported_precision

_PROBE_IMAGES: Final = 64
_FEWEST_PROBES: Final = 8
_MOST_PROBED_PIXELS: Final = 64 * 32 * 32


@dataclass(frozen=True)
class Setup:
    """A run's data and settings, and what follows from them; each property is made when first needed.

    Attributes:
        data: what to train on.
        recipe: all settings.
        out: folder that gets `teacher/`, `student/` and `pruned/`.
        reuse: another run's folder, whose work is taken where this run would do the same.
        teacher: to distil from; None: one is trained.
        console: for messages and progress.
    """

    data: DataSplit
    recipe: Recipe
    out: Path
    reuse: Path | None
    teacher: ReadyTeacher | None
    console: Console

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @property
    def work(self) -> Path:
        """Folder of what is removed or not needed once the run is finished."""
        return self.out / ".training"

    @cached_property
    def progress(self) -> RunProgress:
        """For bars of trainings."""
        return RunProgress(self.console)

    @cached_property
    def inputs(self) -> tuple[Preprocessing, Stem]:
        """Preprocessing and stem of all networks."""
        spec, stem = choose_inputs(self.data.train, self.recipe)
        self.say(
            f"{self.data.name}: {spec.height}x{spec.width} pixels, {stem} stem, {self.device}, "
            f"training in {self.precision}"
        )
        return spec, stem

    @property
    def spec(self) -> Preprocessing:
        """Preprocessing of all networks."""
        return self.inputs[0]

    @cached_property
    def device(self) -> torch.device:
        """Where networks are trained."""
        return choose_device(self.recipe)

    @cached_property
    def precision(self) -> TrainingPrecision:
        """What convolutions are trained in."""
        wanted = self.recipe.precision
        return supported_precision(self.device) if wanted == "auto" else wanted

    @cached_property
    def limits(self) -> Augmentation:
        """How training images are varied."""
        limits = self.recipe.augmentation
        flip = self.spec.height >= PHOTO_SIDE if limits.flip is None else limits.flip
        return limits.model_copy(update={"flip": flip})

    @cached_property
    def train_images(self) -> Images:
        """What networks learn from."""
        return self._load(self.data.train)

    @cached_property
    def validation_images(self) -> Images:
        """What early stopping looks at."""
        return self._load(self.data.validation)

    @cached_property
    def test_images(self) -> Images:
        """What only measures."""
        return self._load(self.data.test)

    def _load(self, images: ImageSet) -> Images:
        return Images(images.load_pixels(self.spec, progress=False), images.targets)

    @cached_property
    def views(self) -> TeacherViews:
        """The training images' views with the teacher's logits, computed once for all later stages."""
        count, seed = self.recipe.distillation.views, derive_seed(self.recipe.seed, "views")
        ready, spec, pixels = self.teacher, self.spec, self.train_images.pixels
        if ready is None:
            network, card = load_checkpoint(self.out / "teacher")
            logits_of: Callable[[Tensor], Tensor] = network.to(self.device)
            origin: list[object] = [card.weights_sha256]
        else:
            spec, logits_of = ready.preprocessing, ready.limited_to(self.data.labels)
            pixels = self.data.train.load_pixels(spec, progress=False)
            origin = [ready.sha256, ready.outputs_of(self.data.labels).tolist(), spec.model_dump(mode="json")]
        mark = fingerprint(
            [*origin, count, seed, self.limits.model_dump(), self.recipe.threads, self.precision]
        )
        path = self.work / "views.safetensors"
        logits = load_logits(self.reuse / path.relative_to(self.out), mark) if self.reuse else None
        if logits is None:
            logits = label_views(
                logits_of,
                pixels,
                spec,
                self.limits,
                views=count,
                seed=seed,
                progress=self.progress,
                device=self.device,
                precision=self.precision,
                kept=path,
                fingerprint=mark,
            )
        targets = torch.from_numpy(self.train_images.targets)
        return TeacherViews(logits, targets, self.limits, self.recipe.distillation, seed)

    @property
    def probe(self) -> Pixels:
        """Training images to look for dead weights with: fewer of large ones, for these take memory."""
        count = max(_FEWEST_PROBES, _MOST_PROBED_PIXELS // (self.spec.height * self.spec.width))
        return self.train_images.pixels[: min(count, _PROBE_IMAGES)]

    def live_share(self, network: nn.Module, architecture: str) -> float:
        """Share of the parameters that receive a gradient at this input size.

        Raises:
            NetworkError: the network cannot take images of this size.
        """
        try:
            return live_parameters(network, self.probe, self.spec)
        except RuntimeError as error:
            size = f"{self.spec.height}x{self.spec.width}"
            raise NetworkError(
                f"{architecture} cannot take {size} images ({error}); choose a larger --image-size"
            ) from error


def choose_device(recipe: Recipe) -> torch.device:
    """Where networks are trained.

    Raises:
        NetworkError: a GPU is asked for, and there is none.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise NetworkError("there is no CUDA GPU here, or this torch is without CUDA; use --device cpu")
    return torch.device("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")


def fingerprint(what: object) -> str:
    """A hash of all that decides an outcome; `what` is data that JSON can write."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
