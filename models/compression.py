"""The compression run: a teacher, a student that learns from it, and the student pruned.

Each stage ends in a checkpoint folder. A rerun keeps a finished stage if everything that determined it is
the same, and continues an interrupted one where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

from models.card import Ancestor, Card, CheckpointError, Metrics, Role
from models.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from models.datasets import OnDamaged, open_dataset
from models.defaults import fit_recipe, pretrained_weights
from models.estimate import RunProgress
from models.evaluation import count_macs, count_parameters, evaluate
from models.files import restore
from models.inputs import typical_side
from models.networks import NetworkError, build_network, draw_weights
from models.pruning import Pruner, find_ratio
from models.recipe import Pruning, Recipe, Training, as_options
from models.rehearsal import Afterwards, estimate
from models.setup import Setup, choose_device, fingerprint
from models.suitability import require_prunable, require_trainable
from models.teacher import ReadyTeacher, measure
from models.training import Objective, TrueLabels, derive_seed, reproducible, train
from models.weights import load_pretrained

LIVE_SHARE: Final = 0.95  # below this most parameters are dead weights

_LIBRARIES: Final = ("trimrt", "torch", "torchvision", "torch-pruning")


@dataclass(frozen=True)
class CompressionRun:
    """What a run made.

    Attributes:
        folder: it holds a checkpoint's folder for each card, named by the card's role.
        cards: of teacher, student and pruned student, or of those up to the last stage asked for.
        progress: knows how long it was to take.
    """

    folder: Path
    cards: list[Card]
    progress: RunProgress = field(repr=False, compare=False)

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
    on_damaged: OnDamaged = "stop",
    teacher: ReadyTeacher | None = None,
    afterwards: Afterwards | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> CompressionRun:
    """Train a teacher, distil a student from it, and prune the student.

    Finished stages are reused, and an interrupted one continues where it stopped. For photographs, settings
    that the recipe does not set itself are chosen to fit the machine (`models.defaults`).

    Args:
        source: `digits`, `digits-unshuffled`, `fashion-mnist`, `glyphs`, a folder of images, or a ZIP file of
            one.
        out: folder for `teacher/`, `student/` and `pruned/`; None: `runs/` and the data's name.
        recipe: every other setting; None: the preset `aligned`.
        fold: part held out for testing, 0 to 4, where the data has no test part.
        until: the last stage to make.
        reuse: another run's folder, whose stages are copied where this run would make the same.
        teacher: a network that is there already, to distil from (`builder.open_teacher`); None: train one.
        on_damaged: what to do about images that cannot be read: stop and name all, or leave them out.
        afterwards: foretells what the caller does with the last checkpoint, which the estimate then has; what
            all of it took is left to the caller to say (`CompressionRun.progress`).
        console: for messages and progress; None: silent.
        command: recorded in the cards, with the settings that were chosen; None: the `trimrt compress`
            command that does the same.

    Raises:
        DatasetError: no such data, or images that cannot be read.
        NetworkError: an architecture, device, weights file or teacher that cannot be used.
        PruningError: a network that cannot be pruned as asked.
        CheckpointError: a damaged checkpoint.
    """
    if teacher is not None and until == "teacher":
        raise NetworkError("the teacher is there already, so there is nothing to make until it is")
    given = recipe or Recipe()
    device = choose_device(given)
    data = open_dataset(str(source), fold=fold, on_damaged=on_damaged)
    name = data.name if data.fold is None else f"{data.name}-fold{data.fold}"
    folder = Path(out) if out else Path("runs") / name
    side, images = typical_side(data.train), len(data.train)
    fitted = fit_recipe(given, side=side, images=images, device=device)
    chosen = as_options(fitted, given)
    if command is None:
        usual = fit_recipe(Recipe(), side=side, images=images, device=device)
        words = ["trimrt", "compress", str(source), "--out", str(folder), "--fold", str(fold)]
        words += ["--until", until, *(["--on-damaged", on_damaged] if on_damaged != "stop" else [])]
        command = shlex.join([*words, *as_options(fitted, Recipe(), usual)])
    else:
        command = " ".join([command, *([shlex.join(chosen)] if chosen else [])])
    place = Path(reuse) if reuse else None
    setup = Setup(data, fitted, folder, place, teacher, console or Console(quiet=True))
    for line in data.summary:
        setup.say(line, "yellow" if line.startswith("WARNING") else None)
    if chosen:
        setup.say(f"chosen for photographs on this machine: {shlex.join(chosen)}")
        if teacher is None and fitted.teacher.weights is None:
            setup.say(_without_pretraining(fitted))
    cards = _Compression(setup, command, until, afterwards).run()
    took = setup.progress.took()
    if took is not None and afterwards is None:
        setup.say(took)
    return CompressionRun(folder, cards, setup.progress)


def _without_pretraining(recipe: Recipe) -> str:
    weights = pretrained_weights(recipe.teacher.architecture)
    missing = f" ({weights} is not there)" if weights else ""
    return (
        f"the teacher learns from these photographs alone{missing}; weights trained on ImageNet make it more "
        "accurate: --teacher-weights FILE, or --teacher FILE for a network of your own"
    )


@dataclass(frozen=True)
class _Stage:
    """Everything that determines a checkpoint: the same stage gives the same weights."""

    role: Role
    name: str
    architecture: str
    settings: dict[str, Any]
    lineage: list[Ancestor]


@dataclass(frozen=True)
class _Compression:
    """One run, stage by stage."""

    setup: Setup
    command: str
    until: Role
    afterwards: Afterwards | None

    def run(self) -> list[Card]:
        """The cards of the checkpoints made, or taken where they are finished."""
        setup = self.setup
        builders: dict[Role, Callable[[_Stage], nn.Module]] = {
            "teacher": self._train_teacher,
            "student": self._train_student,
            "pruned": self._prune,
        }
        with reproducible(setup.recipe.threads), setup.progress:
            cards: list[Card] = []
            lineage: list[Ancestor] = []
            if setup.teacher is not None:
                lineage.append(self._measured_teacher(setup.teacher))
            for role in self._roles:
                if cards:
                    lineage.append(_ancestor(cards[-1]))
                stage = self._stage(role, lineage)
                card = self._finished_anywhere(stage)
                if card is None:
                    card = self._publish(stage, builders[role](stage))
                    for state in setup.work.glob(f"{role}*.pt"):
                        state.unlink()
                cards.append(card)
        return cards

    @property
    def _roles(self) -> list[Role]:
        """What this run makes."""
        roles: list[Role] = ["student", "pruned"] if self.setup.teacher else ["teacher", "student", "pruned"]
        return roles[: roles.index(self.until) + 1]

    def _foretell(self, first: Role) -> None:
        """Estimate how long the stages from this one on will take, before the first of them begins."""
        progress = self.setup.progress
        if progress.estimate is None:
            roles = self._roles[self._roles.index(first) :]
            progress.estimate = estimate(self.setup, roles, self.afterwards)

    def _measured_teacher(self, teacher: ReadyTeacher) -> Ancestor:
        measured = measure(teacher, self.setup.data, self.setup.device)
        self.setup.say(
            f"teacher: {teacher.name}, {teacher.parameters:,} parameters, "
            f"{measured.metrics.validation_accuracy:.2%} of the validation images right"
        )
        return measured

    def _stage(self, role: Role, lineage: list[Ancestor]) -> _Stage:
        sections = {
            "teacher": {"teacher"},
            "student": {"teacher", "student", "distillation"},
            "pruned": {"teacher", "student", "distillation", "pruning"},
        }[role]
        settings = self.setup.recipe.model_dump(mode="json", include={"seed", "threads", "image"} | sections)
        settings |= {
            "device": self.setup.device.type,
            "precision": self.setup.precision,
            "augmentation": self.setup.limits.model_dump(mode="json"),
        }
        weights = self.setup.recipe.teacher.weights
        if self.setup.teacher is not None:
            settings["teacher"] = {"network": self.setup.teacher.name, "sha256": self.setup.teacher.sha256}
        elif weights is not None:
            settings["teacher"]["weights_sha256"] = _file_sha256(weights)
        if role == "pruned":
            settings["pruning"]["ratio"] = self._pruning_ratio()
        network = self.setup.recipe.teacher if role == "teacher" else self.setup.recipe.student
        suffix = "-unpruned" if role == "student" else ""
        return _Stage(
            role=role,
            name=f"{self.setup.data.name}-{network.architecture.replace(':', '-')}{suffix}",
            architecture=network.architecture,
            settings=settings,
            lineage=list(lineage),
        )

    def _finished_anywhere(self, stage: _Stage) -> Card | None:
        """The card of the stage's checkpoint if that is finished here or in the run to reuse."""
        folder = self.setup.out / stage.role
        for place in (folder, *([self.setup.reuse / stage.role] if self.setup.reuse else [])):
            card = self._finished(place, stage)
            if card is not None:
                if place != folder:
                    copy_checkpoint(place, folder)
                self.setup.say(f"{stage.role}: {card.name} is finished already, reused from {place}")
                return card
        return None

    def _finished(self, folder: Path, stage: _Stage) -> Card | None:
        """The card of the checkpoint in `folder` if `stage` would make just that one."""
        restore(folder)
        if not folder.exists():
            return None
        try:
            card = load_checkpoint(folder)[1]
        except CheckpointError as error:
            self.setup.say(f"{stage.role}: made again, because {error}", "yellow")
            return None
        same = (
            (card.architecture, card.recipe, card.lineage, card.dataset)
            == (stage.architecture, stage.settings, stage.lineage, self.setup.data.card())
        ) and (card.preprocessing, card.stem) == self.setup.inputs
        if not same and folder.parent == self.setup.out:
            self.setup.say(f"{stage.role}: made again, because {folder} has another recipe or data", "yellow")
        return card if same else None

    def _publish(self, stage: _Stage, network: nn.Module) -> Card:
        network.to("cpu")
        validation, test = (
            evaluate(network, images.pixels, images.targets, self.setup.spec)
            for images in (self.setup.validation_images, self.setup.test_images)
        )
        card = Card(
            name=stage.name,
            role=stage.role,
            architecture=stage.architecture,
            stem=self.setup.inputs[1],
            labels=list(self.setup.data.labels),
            preprocessing=self.setup.spec,
            dataset=self.setup.data.card(),
            metrics=Metrics(
                **asdict(test),
                validation_accuracy=validation.accuracy,
                parameters=count_parameters(network),
                macs=count_macs(network, self.setup.spec.height, self.setup.spec.width),
                live_parameters=self.setup.live_share(network, stage.architecture),
            ),
            seed=self.setup.recipe.seed,
            recipe=stage.settings,
            command=self.command,
            lineage=stage.lineage,
            versions={library: importlib.metadata.version(library) for library in _LIBRARIES},
        )
        card = save_checkpoint(self.setup.out / stage.role, network, card)
        self.setup.say(
            f"{stage.role}: {card.name}, {card.metrics.parameters:,} parameters, "
            f"{validation.accuracy:.2%} of the validation images right"
        )
        return card

    def _train_teacher(self, stage: _Stage) -> nn.Module:
        network = self._new_network(stage)
        weights = self.setup.recipe.teacher.weights
        if weights is not None:
            random = load_pretrained(network, weights)
            if random:
                untrained = not self.setup.recipe.teacher.epochs
                self.setup.say(
                    f"teacher: not in {weights} in this shape, so trained from scratch: {', '.join(random)}"
                    + ("; with 0 epochs that teaches nothing, so give --teacher-epochs" if untrained else ""),
                    "yellow" if untrained else None,
                )
        self._foretell("teacher")
        seed = derive_seed(self.setup.recipe.seed, "teacher")
        targets = torch.from_numpy(self.setup.train_images.targets)
        self._fit(network, stage, TrueLabels(targets, self.setup.limits, seed), self.setup.recipe.teacher)
        return network

    def _train_student(self, stage: _Stage) -> nn.Module:
        network = self._new_network(stage)
        self._foretell("student")
        self._fit(network, stage, self.setup.views, self.setup.recipe.student)
        return network

    def _pruning_ratio(self) -> float:
        """The recipe's ratio, or the one found for its target."""
        settings, spec = self.setup.recipe.pruning, self.setup.spec
        if settings.target_parameters is None and settings.target_macs is None:
            return settings.ratio
        student, _ = load_checkpoint(self.setup.out / "student")
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
        self.setup.say(f"pruned: the target asks for a pruning ratio of {max(ratios):.4f}")
        return max(ratios)

    def _prune(self, stage: _Stage) -> nn.Module:
        self._foretell("pruned")
        network, _ = load_checkpoint(self.setup.out / "student")
        settings = Pruning.model_validate(stage.settings["pruning"])
        pruner = Pruner(network, self.setup.spec, settings, settings.ratio)
        for step in range(1, settings.steps + 1):
            network.to("cpu")
            pruner.step()
            if settings.weights == "random":
                torch.manual_seed(derive_seed(self.setup.recipe.seed, f"pruned weights {step}"))
                draw_weights(network)
            # A finished step restores its weights from its state file, so the next prunes the same.
            self._fit(network, stage, self.setup.views, settings, part=f"-{step}")
        return network

    def _check_architectures(self) -> None:
        """Raise now what would be raised after hours of training."""
        spec, stem = self.setup.inputs
        recipe, classes = self.setup.recipe, len(self.setup.data.labels)
        if "teacher" in self._roles:
            require_trainable(recipe.teacher.architecture, classes, stem, spec)
        if "student" in self._roles:
            require_trainable(recipe.student.architecture, classes, stem, spec)
        if "pruned" in self._roles:
            require_prunable(recipe.student.architecture, classes, stem, spec, recipe.pruning)

    def _new_network(self, stage: _Stage) -> nn.Module:
        self._check_architectures()
        torch.manual_seed(derive_seed(self.setup.recipe.seed, f"{stage.role} weights"))
        network = build_network(stage.architecture, len(self.setup.data.labels), self.setup.inputs[1])
        live = self.setup.live_share(network, stage.architecture)
        if live < LIVE_SHARE:
            self.setup.say(
                f"warning: only {live:.0%} of {stage.architecture}'s parameters receive a gradient "
                "at this input size, the rest are dead weights; use a larger --image-size or the small stem",
                "bold yellow",
            )
        return network

    def _fit(
        self, network: nn.Module, stage: _Stage, objective: Objective, settings: Training, *, part: str = ""
    ) -> None:
        network.to(self.setup.device)
        self.setup.work.mkdir(parents=True, exist_ok=True)  # fail before training, not after
        train(
            network,
            self.setup.train_images,
            self.setup.validation_images,
            self.setup.spec,
            objective,
            settings,
            name=f"{stage.role}{part}",
            seed=derive_seed(self.setup.recipe.seed, f"{stage.role}{part}"),
            state_file=self.setup.work / f"{stage.role}{part}.pt",
            fingerprint=fingerprint(
                [
                    stage.settings,
                    [ancestor.weights_sha256 for ancestor in stage.lineage],
                    self.setup.data.sha256,
                    self.setup.data.fold,
                    torch.__version__,
                ]
            ),
            progress=self.setup.progress,
            precision=self.setup.precision,
        )


def _ancestor(card: Card) -> Ancestor:
    return Ancestor.model_validate(card.model_dump(include=set(Ancestor.model_fields)))


def _file_sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NetworkError(f"cannot read weights from {path}: {error.strerror}") from error
