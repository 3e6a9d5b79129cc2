"""The compression run: a teacher, a student that learns from it, and the student pruned.

Each stage ends in a checkpoint folder. A rerun keeps a finished stage if everything that determined it is
the same, and continues an interrupted one where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from models.card import Ancestor, Card, CheckpointError, Metrics
from models.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from models.datasets import DataSplit, ImageSet, open_dataset
from models.distillation import TeacherViews, label_views, load_logits, save_logits
from models.evaluation import count_macs, count_parameters, evaluate, live_parameters
from models.files import restore
from models.inputs import PHOTO_SIDE, choose_inputs
from models.networks import (
    NetworkError,
    Stem,
    build_network,
    channel_plan,
    draw_weights,
    load_pretrained,
)
from models.preprocessing import Preprocessing
from models.pruning import Pruner, find_ratio
from models.recipe import Augmentation, Pruning, Recipe, Training, TrainingPrecision, as_options
from models.training import (
    Images,
    Objective,
    TrueLabels,
    derive_seed,
    reproducible,
    supported_precision,
    train,
)

LIVE_SHARE: Final = 0.95  # below this most parameters are dead weights

_PROBE_IMAGES: Final = 64
_LIBRARIES: Final = ("trimrt", "torch", "torchvision", "torch-pruning")

Role = Literal["teacher", "student", "pruned"]


@dataclass(frozen=True)
class CompressionRun:
    """What a run made.

    Attributes:
        folder: it holds a checkpoint's folder for each card, named by the card's role.
        cards: of teacher, student and pruned student, or of those up to the last stage asked for.
    """

    folder: Path
    cards: list[Card]

    @property
    def checkpoint(self) -> Path:
        """Folder of the last checkpoint, which `builder.build` takes."""
        return self.folder / self.cards[-1].role


def compress(
    source: str | Path,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    fold: int = 0,
    until: Role = "pruned",
    reuse: str | Path | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> CompressionRun:
    """Train a teacher, distil a student from it, and prune the student.

    Finished stages are reused, and an interrupted one continues where it stopped.

    Args:
        source: `digits`, `digits-unshuffled`, `fashion-mnist`, or a folder of images.
        out: folder for `teacher/`, `student/` and `pruned/`; None: `runs/` and the data's name.
        recipe: every other setting; None: the preset `aligned`.
        fold: part held out for testing, 0 to 4, where the data has no test part.
        until: the last stage to make.
        reuse: another run's folder, whose stages are copied where this run would make the same.
        console: for messages and progress; None: silent.
        command: recorded in the cards; None: the `trimrt compress` command that does the same.

    Raises:
        DatasetError: no such data, or images that cannot be read.
        NetworkError: an architecture, device or weights file that cannot be used.
        PruningError: a network that cannot be pruned as asked.
        CheckpointError: a damaged checkpoint.
    """
    recipe = recipe or Recipe()
    data = open_dataset(str(source), fold=fold)
    name = data.name if data.fold is None else f"{data.name}-fold{data.fold}"
    folder = Path(out) if out else Path("runs") / name
    if command is None:
        words = ["trimrt", "compress", str(source), "--out", str(folder), "--fold", str(fold)]
        command = shlex.join([*words, "--until", until, *as_options(recipe)])
    run = Compression(
        data=data,
        recipe=recipe,
        out=folder,
        console=console or Console(quiet=True),
        command=command,
        reuse=Path(reuse) if reuse else None,
        until=until,
    )
    return CompressionRun(folder, run.run())


@dataclass(frozen=True)
class _Stage:
    """Everything that determines a checkpoint: the same stage gives the same weights."""

    role: Role
    name: str
    architecture: str
    settings: dict[str, Any]
    ancestors: tuple[Card, ...]

    @property
    def lineage(self) -> list[Ancestor]:
        return [
            Ancestor.model_validate(card.model_dump(include=set(Ancestor.model_fields)))
            for card in self.ancestors
        ]


@dataclass(frozen=True)
class Compression:
    """One run on one data split.

    Attributes:
        data: what to train on.
        recipe: all settings.
        out: folder that gets `teacher/`, `student/` and `pruned/`.
        console: for messages and progress.
        command: recorded in the cards.
        reuse: another run's folder, whose stages are copied where this run would make the same.
        until: the last stage to make.
    """

    data: DataSplit
    recipe: Recipe
    out: Path
    console: Console
    command: str = ""
    reuse: Path | None = None
    until: Role = "pruned"

    def run(self) -> list[Card]:
        """Make the checkpoints, or take them where they are finished.

        Returns:
            The cards of teacher, student and pruned student, or of those up to `until`.

        Raises:
            DatasetError: images that cannot be read.
            NetworkError: an architecture, device or weights file that cannot be used.
            PruningError: a network that cannot be pruned as asked.
            CheckpointError: a damaged checkpoint.
        """
        with reproducible(self.recipe.threads), self._progress:
            builders = {
                "teacher": self._train_teacher,
                "student": self._train_student,
                "pruned": self._prune,
            }
            cards: list[Card] = []
            for role in get_args(Role):
                cards.append(self._make(self._stage(role, *cards), builders[role]))
                if role == self.until:
                    break
        return cards

    # Shared by all stages; each is made when first needed.

    @cached_property
    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[info]}"))
        return Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)

    @cached_property
    def _inputs(self) -> tuple[Preprocessing, Stem]:
        spec, stem = choose_inputs(self.data.train, self.recipe)
        self._say(
            f"{self.data.name}: {spec.height}x{spec.width} pixels, {stem} stem, {self._device}, "
            f"training in {self._precision}"
        )
        return spec, stem

    @property
    def _spec(self) -> Preprocessing:
        return self._inputs[0]

    @cached_property
    def _device(self) -> torch.device:
        wanted = self.recipe.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise NetworkError("there is no CUDA GPU here, or this torch is without CUDA; use --device cpu")
        return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")

    @cached_property
    def _precision(self) -> TrainingPrecision:
        wanted = self.recipe.precision
        return supported_precision(self._device) if wanted == "auto" else wanted

    @cached_property
    def _limits(self) -> Augmentation:
        limits = self.recipe.augmentation
        flip = self._spec.height >= PHOTO_SIDE if limits.flip is None else limits.flip
        return limits.model_copy(update={"flip": flip})

    @cached_property
    def _train_images(self) -> Images:
        return self._load(self.data.train)

    @cached_property
    def _validation_images(self) -> Images:
        return self._load(self.data.validation)

    @cached_property
    def _test_images(self) -> Images:
        return self._load(self.data.test)

    def _load(self, images: ImageSet) -> Images:
        return Images(images.load_pixels(self._spec, progress=False), images.targets)

    @cached_property
    def _views(self) -> TeacherViews:
        """The training images' views with the teacher's logits, computed once for all later stages."""
        teacher, card = load_checkpoint(self.out / "teacher")
        count, seed = self.recipe.distillation.views, derive_seed(self.recipe.seed, "views")
        fingerprint = _fingerprint(
            [
                card.weights_sha256,
                count,
                seed,
                self._limits.model_dump(),
                self.recipe.threads,
                self._precision,
            ]
        )
        path = self._work / "views.safetensors"
        logits = load_logits(path, fingerprint)
        if logits is None and self.reuse:
            logits = load_logits(self.reuse / path.relative_to(self.out), fingerprint)
        if logits is None:
            teacher.to(self._device)
            logits = label_views(
                teacher,
                self._train_images.pixels,
                self._spec,
                self._limits,
                views=count,
                seed=seed,
                progress=self._progress,
                precision=self._precision,
            )
            save_logits(path, logits, fingerprint)
        targets = torch.from_numpy(self._train_images.targets)
        return TeacherViews(logits, targets, self._limits, self.recipe.distillation, seed)

    @property
    def _work(self) -> Path:
        return self.out / ".training"

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    # The stages.

    def _stage(self, role: Role, *ancestors: Card) -> _Stage:
        sections = {
            "teacher": {"teacher"},
            "student": {"teacher", "student", "distillation"},
            "pruned": {"teacher", "student", "distillation", "pruning"},
        }[role]
        settings = self.recipe.model_dump(mode="json", include={"seed", "threads", "image"} | sections)
        settings |= {
            "device": self._device.type,
            "precision": self._precision,
            "augmentation": self._limits.model_dump(mode="json"),
        }
        weights = self.recipe.teacher.weights
        if weights is not None:
            settings["teacher"]["weights_sha256"] = _file_sha256(weights)
        if role == "pruned":
            settings["pruning"]["ratio"] = self._pruning_ratio()
        network = self.recipe.teacher if role == "teacher" else self.recipe.student
        suffix = "-unpruned" if role == "student" else ""
        return _Stage(
            role=role,
            name=f"{self.data.name}-{network.architecture}{suffix}",
            architecture=network.architecture,
            settings=settings,
            ancestors=ancestors,
        )

    def _make(self, stage: _Stage, build: Callable[[_Stage], nn.Module]) -> Card:
        folder = self.out / stage.role
        for place in (folder, *([self.reuse / stage.role] if self.reuse else [])):
            card = self._finished(place, stage)
            if card is not None:
                if place != folder:
                    copy_checkpoint(place, folder)
                self._say(f"{stage.role}: {card.name} is finished already, reused from {place}")
                return card
        card = self._publish(stage, build(stage))
        for state in self._work.glob(f"{stage.role}*.pt"):
            state.unlink()
        return card

    def _finished(self, folder: Path, stage: _Stage) -> Card | None:
        """The card of the checkpoint in `folder` if `stage` would make just that one."""
        restore(folder)
        if not folder.exists():
            return None
        try:
            card = load_checkpoint(folder)[1]
        except CheckpointError as error:
            self._say(f"{stage.role}: made again, because {error}", "yellow")
            return None
        same = (
            (card.architecture, card.recipe, card.lineage, card.dataset)
            == (stage.architecture, stage.settings, stage.lineage, self.data.card())
        ) and (card.preprocessing, card.stem) == self._inputs
        if not same and folder.parent == self.out:
            self._say(f"{stage.role}: made again, because {folder} has another recipe or data", "yellow")
        return card if same else None

    def _publish(self, stage: _Stage, network: nn.Module) -> Card:
        network.to("cpu")
        validation, test = (
            evaluate(network, images.pixels, images.targets, self._spec)
            for images in (self._validation_images, self._test_images)
        )
        card = Card(
            name=stage.name,
            role=stage.role,
            architecture=stage.architecture,
            stem=self._inputs[1],
            labels=list(self.data.labels),
            preprocessing=self._spec,
            dataset=self.data.card(),
            metrics=Metrics(
                accuracy=test.accuracy,
                validation_accuracy=validation.accuracy,
                loss=test.loss,
                wrong=test.wrong,
                images=test.images,
                parameters=count_parameters(network),
                macs=count_macs(network, self._spec.height, self._spec.width),
                live_parameters=self._live_share(network, stage.architecture),
            ),
            seed=self.recipe.seed,
            recipe=stage.settings,
            command=self.command,
            lineage=stage.lineage,
            versions={library: importlib.metadata.version(library) for library in _LIBRARIES},
        )
        card = save_checkpoint(self.out / stage.role, network, card)
        self._say(
            f"{stage.role}: {card.name}, {card.metrics.parameters:,} parameters, "
            f"{validation.accuracy:.2%} of the validation images right"
        )
        return card

    def _train_teacher(self, stage: _Stage) -> nn.Module:
        network = self._new_network(stage)
        weights = self.recipe.teacher.weights
        if weights is not None:
            random = load_pretrained(network, weights)
            if random:
                self._say(
                    f"teacher: not in {weights} in this shape, so trained from scratch: {', '.join(random)}"
                )
        seed = derive_seed(self.recipe.seed, "teacher")
        targets = torch.from_numpy(self._train_images.targets)
        self._fit(network, stage, TrueLabels(targets, self._limits, seed), self.recipe.teacher)
        return network

    def _train_student(self, stage: _Stage) -> nn.Module:
        network = self._new_network(stage)
        self._fit(network, stage, self._views, self.recipe.student)
        return network

    def _pruning_ratio(self) -> float:
        """The recipe's ratio, or the one found for its target."""
        settings, spec = self.recipe.pruning, self._spec
        if settings.target_parameters is None and settings.target_macs is None:
            return settings.ratio
        student, _ = load_checkpoint(self.out / "student")
        ratios = []
        if settings.target_parameters is not None:
            ratios.append(find_ratio(student, spec, settings, count_parameters, settings.target_parameters))
        if settings.target_macs is not None:
            ratios.append(
                find_ratio(
                    student,
                    spec,
                    settings,
                    lambda net: count_macs(net, spec.height, spec.width),
                    settings.target_macs,
                )
            )
        self._say(f"pruned: the target asks for a pruning ratio of {max(ratios):.4f}")
        return max(ratios)

    def _prune(self, stage: _Stage) -> nn.Module:
        network, _ = load_checkpoint(self.out / "student")
        settings = Pruning.model_validate(stage.settings["pruning"])
        pruner = Pruner(network, self._spec, settings, settings.ratio)
        for step in range(1, settings.steps + 1):
            network.to("cpu")
            pruner.step()
            if settings.weights == "random":
                torch.manual_seed(derive_seed(self.recipe.seed, f"pruned weights {step}"))
                draw_weights(network)
            # A finished step restores its weights from its state file, so the next prunes the same.
            self._fit(network, stage, self._views, settings, part=f"-{step}")
        return network

    def _check_that_the_student_can_be_pruned(self) -> None:
        """Raise now what pruning would raise after hours of training."""
        settings, architecture = self.recipe.pruning, self.recipe.student.architecture
        classes, stem = len(self.data.labels), self._inputs[1]
        student = build_network(architecture, classes, stem).eval()
        self._live_share(student, architecture)
        Pruner(student, self._spec, settings, settings.ratio).step()
        channel_plan(student, architecture, classes, stem)

    def _new_network(self, stage: _Stage) -> nn.Module:
        self._check_that_the_student_can_be_pruned()
        torch.manual_seed(derive_seed(self.recipe.seed, f"{stage.role} weights"))
        network = build_network(stage.architecture, len(self.data.labels), self._inputs[1])
        live = self._live_share(network, stage.architecture)
        if live < LIVE_SHARE:
            self._say(
                f"warning: only {live:.0%} of {stage.architecture}'s parameters receive a gradient "
                "at this input size, the rest are dead weights; use a larger --image-size or the small stem",
                "bold yellow",
            )
        return network

    def _live_share(self, network: nn.Module, architecture: str) -> float:
        try:
            return live_parameters(network, self._train_images.pixels[:_PROBE_IMAGES], self._spec)
        except RuntimeError as error:
            size = f"{self._spec.height}x{self._spec.width}"
            raise NetworkError(
                f"{architecture} cannot take {size} images ({error}); choose a larger --image-size"
            ) from error

    def _fit(
        self, network: nn.Module, stage: _Stage, objective: Objective, settings: Training, *, part: str = ""
    ) -> None:
        network.to(self._device)
        self._work.mkdir(parents=True, exist_ok=True)  # fail before training, not after
        train(
            network,
            self._train_images,
            self._validation_images,
            self._spec,
            objective,
            settings,
            name=f"{stage.role}{part}",
            seed=derive_seed(self.recipe.seed, f"{stage.role}{part}"),
            state_file=self._work / f"{stage.role}{part}.pt",
            fingerprint=_fingerprint(
                [
                    stage.settings,
                    [card.weights_sha256 for card in stage.ancestors],
                    self.data.sha256,
                    self.data.fold,
                    torch.__version__,
                ]
            ),
            progress=self._progress,
            precision=self._precision,
        )


def _fingerprint(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NetworkError(f"cannot read weights from {path}: {error.strerror}") from error
