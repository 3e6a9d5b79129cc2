"""The compression run: a teacher, a student that learns from it, and the student pruned.

Each stage ends in a checkpoint folder. A rerun keeps a finished stage if everything that determined it is
the same, and continues an interrupted one where it stopped.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from models.card import Card, Role
from models.datasets import OnDamaged, open_dataset
from models.defaults import fit_recipe, pretrained_weights
from models.estimate import RunProgress
from models.finding import points_of
from models.fitting import TargetDevice
from models.inputs import typical_side
from models.networks import NetworkError
from models.recipe import Recipe, as_options
from models.rehearsal import Afterwards
from models.setup import Setup, choose_device
from models.stages import Stages
from models.teacher import ReadyTeacher
from models.widths import BudgetError


@dataclass(frozen=True)
class CompressionRun:
    """What a run made.

    Attributes:
        folder: it holds a checkpoint's folder for each card, named by the card's role.
        cards: of teacher, student, the points on the way and the pruned student, or of those up to the last
            stage asked for.
        progress: knows how long it was to take.
    """

    folder: Path
    cards: list[Card]
    progress: RunProgress = field(repr=False, compare=False)

    @property
    def checkpoint(self) -> Path:
        """Folder of the last checkpoint, which `builder.build` takes."""
        return self.folder / self.cards[-1].role

    @property
    def pruned(self) -> list[Path]:
        """Folders of the last checkpoint and of those on the way to it, the slowest first."""
        return [*points_of(self.folder), self.checkpoint]


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
    device: TargetDevice | None = None,
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
        device: what the recipe's budget is for (`builder.FittingDevice`); needed for a latency.
        on_damaged: what to do about images that cannot be read: stop and name all, or leave them out.
        afterwards: foretells what the caller does with the last checkpoint, which the estimate then has; what
            all of it took is left to the caller to say (`CompressionRun.progress`).
        console: for messages and progress; None: silent.
        command: recorded in the cards, with the settings that were chosen; None: the `trimrt compress`
            command that does the same.

    Raises:
        DatasetError: no such data, or images that cannot be read.
        BudgetError: no network is within the recipe's budget.
        LatencyError: a latency table that is of something else, or cannot be measured.
        NetworkError: an architecture, device, weights file or teacher that cannot be used.
        PruningError: a network that cannot be pruned as asked.
        CheckpointError: a damaged checkpoint.
    """
    if teacher is not None and until == "teacher":
        raise NetworkError("the teacher is there already, so there is nothing to make until it is")
    given = recipe or Recipe()
    _require_clear(given, device)
    trained_on = choose_device(given)
    data = open_dataset(str(source), fold=fold, on_damaged=on_damaged)
    name = data.name if data.fold is None else f"{data.name}-fold{data.fold}"
    folder = Path(out) if out else Path("runs") / name
    side, images = typical_side(data.train), len(data.train)
    fitted = fit_recipe(given, side=side, images=images, device=trained_on)
    chosen = as_options(fitted, given)
    if command is None:
        usual = fit_recipe(Recipe(), side=side, images=images, device=trained_on)
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
    cards = Stages(setup, command, until, device, afterwards).run()
    took = setup.progress.took()
    if took is not None and afterwards is None:
        setup.say(took)
    return CompressionRun(folder, cards, setup.progress)


def _require_clear(recipe: Recipe, device: TargetDevice | None) -> None:
    """Raise `BudgetError` if the recipe asks for a budget and for something else."""
    if recipe.front > 1 and not recipe.budget:
        raise BudgetError("--front keeps networks on the way to a budget: --latency-ms, --size-mb or --macs")
    for name in ("target_parameters", "target_macs"):
        if recipe.budget and getattr(recipe.pruning, name) is not None:
            flag = f"--pruning-{name.replace('_', '-')}"
            raise BudgetError(f"a budget gives each group a width of its own; leave out {flag}")
    if "latency_ms" in recipe.budget and device is None:
        raise BudgetError("a latency is of a device: pass one, such as builder.FittingDevice()")


def _without_pretraining(recipe: Recipe) -> str:
    weights = pretrained_weights(recipe.teacher.architecture)
    missing = f" ({weights} is not there)" if weights else ""
    return (
        f"the teacher learns from these photographs alone{missing}; weights trained on ImageNet make it more "
        "accurate: --teacher-weights FILE, or --teacher FILE for a network of your own"
    )
