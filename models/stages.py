"""The stages of a compression run: what determines each, how it is made, and where it is finished already."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from models.card import Ancestor, Card, CheckpointError, Metrics, Role, read_card
from models.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from models.evaluation import count_macs, count_parameters, evaluate
from models.files import restore
from models.finding import point_name, points_of
from models.fitting import Fit, Fitter, TargetDevice, load_fit, save_fit
from models.groups import ChannelGroups
from models.networks import NetworkError, build_network, draw_weights
from models.promise import Promise
from models.pruning import Pruner, find_ratio
from models.recipe import Pruning, Training
from models.rehearsal import Afterwards, estimate
from models.setup import Setup, fingerprint
from models.suitability import require_prunable, require_trainable
from models.teacher import ReadyTeacher, measure
from models.training import Objective, TrueLabels, derive_seed, reproducible, train
from models.weights import load_pretrained

LIVE_SHARE: Final = 0.95  # below this most parameters are dead weights
LATENCY_TABLE: Final = "latency.json"  # of this machine, in a run's folder

_LIBRARIES: Final = ("trimrt", "torch", "torchvision", "torch-pruning")


@dataclass(frozen=True)
class _Stage:
    """Everything that determines a checkpoint: the same stage gives the same weights."""

    role: Role
    name: str
    architecture: str
    settings: dict[str, Any]
    lineage: list[Ancestor]


@dataclass(frozen=True)
class _Made:
    """A network that a stage made, and what that was to cost."""

    network: nn.Module
    promise: Promise | None = None


@dataclass(frozen=True)
class Stages:
    """One run, stage by stage.

    Attributes:
        setup: what all stages share.
        command: recorded in the cards.
        until: the last stage to make.
        device: what the recipe's budget is for; None: it has none.
        afterwards: see `models.compression.compress`.
    """

    setup: Setup
    command: str
    until: Role
    device: TargetDevice | None
    afterwards: Afterwards | None

    def run(self) -> list[Card]:
        """The cards of the checkpoints made, or taken where they are finished."""
        setup = self.setup
        builders: dict[Role, Callable[[_Stage], _Made]] = {
            "teacher": self._train_teacher,
            "student": self._train_student,
            "pruned": self._prune,
        }
        if "pruned" in self._roles and setup.recipe.budget:
            self._fitter.require_possible()
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
                    card = self._publish(stage, builders[role](stage), role)
                    for state in setup.work.glob(f"{role}*"):
                        state.unlink()
                cards.append(card)
        if "pruned" in self._roles:
            cards[-1:-1] = [read_card(point) for point in points_of(setup.out)]
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
            progress.estimate = estimate(self.setup, roles, self._narrow, self.afterwards)

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
        budget = self.setup.recipe.budget
        if role == "pruned" and budget:
            table = self._fitter.table
            settings["budget"] = {
                **budget,
                "front": self.setup.recipe.front,
                "latency_table": None if table is None else fingerprint(table.model_dump(mode="json")),
            }
        elif role == "pruned":
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
                    if stage.role == "pruned":
                        self._copy_points(place.parent)
                    copy_checkpoint(place, folder)
                self.setup.say(f"{stage.role}: {card.name} is finished already, reused from {place}")
                return card
        return None

    def _copy_points(self, run: Path) -> None:
        """Take over what another run made on the way to its pruned network."""
        for point in points_of(self.setup.out):
            shutil.rmtree(point)
        for point in points_of(run):
            copy_checkpoint(point, self.setup.out / point.name)

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

    def _publish(self, stage: _Stage, made: _Made, folder: str) -> Card:
        network, promise = made.network.to("cpu"), made.promise
        validation, test = (
            evaluate(network, images.pixels, images.targets, self.setup.spec)
            for images in (self.setup.validation_images, self.setup.test_images)
        )
        card = Card(
            name=stage.name if promise is None else f"{stage.name}-{promise.suffix}",
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
            promise=promise,
            seed=self.setup.recipe.seed,
            recipe=stage.settings,
            command=self.command,
            lineage=stage.lineage,
            versions={library: importlib.metadata.version(library) for library in _LIBRARIES},
        )
        card = save_checkpoint(self.setup.out / folder, network, card)
        self.setup.say(
            f"{folder}: {card.name}, {card.metrics.parameters:,} parameters, "
            f"{validation.accuracy:.2%} of the validation images right"
        )
        return card

    def _train_teacher(self, stage: _Stage) -> _Made:
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
        return _Made(network)

    def _train_student(self, stage: _Stage) -> _Made:
        network = self._new_network(stage)
        self._foretell("student")
        self._fit(network, stage, self.setup.views, self.setup.recipe.student)
        return _Made(network)

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

    def _prune(self, stage: _Stage) -> _Made:
        self._foretell("pruned")
        for point in points_of(self.setup.out):
            shutil.rmtree(point)
        network, _ = load_checkpoint(self.setup.out / "student")
        recipe, spec = self.setup.recipe, self.setup.spec
        settings = Pruning.model_validate(stage.settings["pruning"])
        pruner = None if recipe.budget else Pruner(network, spec, settings, settings.ratio)
        promise: Promise | None = None
        for step in range(1, recipe.pruning_steps + 1):
            network.to("cpu")
            if pruner is not None:
                pruner.step()
            else:
                fit = self._fit_widths(network, stage, step)
                ChannelGroups(network, spec).prune(fit.widths)
                promise = fit.promise
            if settings.weights == "random":
                torch.manual_seed(derive_seed(self.setup.recipe.seed, f"pruned weights {step}"))
                draw_weights(network)
            # A finished step restores its weights from its state file, so the next prunes the same.
            self._fit(network, stage, self.setup.views, settings, part=f"-{step}")
            number, left = divmod(step, settings.steps)
            if not left and number < recipe.front:
                self._publish(stage, _Made(network, promise), point_name(number))
        return _Made(network, promise)

    @cached_property
    def _fitter(self) -> Fitter:
        """Finds widths within the recipe's budget."""
        self._check_architectures()
        setup, recipe = self.setup, self.setup.recipe
        architecture = recipe.student.architecture
        network = build_network(architecture, len(setup.data.labels), setup.inputs[1]).eval()
        table = None
        if "latency_ms" in recipe.budget and self.device is not None:
            table = self.device.open_table(
                network,
                architecture,
                setup.spec,
                setup.out / LATENCY_TABLE,
                setup.reuse / LATENCY_TABLE if setup.reuse else None,
            )
        return Fitter(network, setup.spec, recipe.budget, recipe.pruning.round_to, table, self.device)

    def _fit_widths(self, network: nn.Module, stage: _Stage, step: int) -> Fit:
        """Those that a step prunes to; an interrupted run finds them again."""
        recipe = self.setup.recipe
        file, mark = self.setup.work / f"pruned-{step}.json", self._fingerprint(stage)
        if fit := load_fit(file, mark):
            return fit
        share = step / recipe.pruning_steps
        fit = self._fitter.fit(
            network, self._fitter.on_the_way(share), tried=step % recipe.pruning.steps == 0
        )
        for line in fit.promise.lines():
            self.setup.say(f"pruned: {line}")
        save_fit(file, mark, fit)
        return fit

    def _narrow(self, network: nn.Module, share: float) -> None:
        """Prune to that share of the way to the budget, or as far as all steps do."""
        recipe, spec = self.setup.recipe, self.setup.spec
        if recipe.budget:
            fit = self._fitter.fit(network, self._fitter.on_the_way(share), tried=False)
            ChannelGroups(network, spec).prune(fit.widths)
        else:
            settings = recipe.pruning.model_copy(update={"steps": 1})
            Pruner(network, spec, settings, settings.ratio).step()

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
            fingerprint=self._fingerprint(stage),
            progress=self.setup.progress,
            precision=self.setup.precision,
        )

    def _fingerprint(self, stage: _Stage) -> str:
        """Of all that decides a stage's weights."""
        return fingerprint(
            [
                stage.settings,
                [ancestor.weights_sha256 for ancestor in stage.lineage],
                self.setup.data.sha256,
                self.setup.data.fold,
                torch.__version__,
            ]
        )


def _ancestor(card: Card) -> Ancestor:
    return Ancestor.model_validate(card.model_dump(include=set(Ancestor.model_fields)))


def _file_sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NetworkError(f"cannot read weights from {path}: {error.strerror}") from error
