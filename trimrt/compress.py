"""`trimrt compress`: the command line of a compression run, generated from the recipe."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from builder.prepare.options import PrepareOptions
from models.files import require_writable
from models.finding import RUNS
from models.folders import OnDamaged
from models.recipe import PRESETS, Recipe, RecipeError, Settings, make_recipe
from trimrt.options import (
    ENGINES,
    FOLDER,
    HELP,
    Choice,
    Command,
    Existing,
    on_damaged_option,
    options_of,
    take,
)

if TYPE_CHECKING:
    from rich.console import Console

    from builder.fitting import FittingDevice
    from models.card import Role
    from models.compression import CompressionRun
    from models.rehearsal import Afterwards
    from models.teacher import ReadyTeacher

_EPILOG: Final = """\
Every setting can also stand in a TOML file (--config): `--teacher-epochs 36` is `epochs = 36` under
`[teacher]`. Options win over the file, and the file over the preset.
"""
# How a teacher in an ONNX file takes images, and what its outputs are.
_ABOUT_TEACHER: Final = (
    *("preprocess", "resize", "interpolation", "image_size"),
    *("output_name", "activation", "labels"),
)
_AS_TYPED: Final = f"{__name__}.as_typed"


class _RecipeCommand(Command):
    """A command whose help shows the recipe's options section by section."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_AS_TYPED] = shlex.join(["trimrt", "compress", *args])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue
            section, nested, _ = str(parameter.name).partition("__")
            if not nested:
                section = "Run" if section in Recipe.model_fields else "Options"
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(section.capitalize(), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def _overrides(values: dict[str, Any]) -> Settings:
    """The options that were given, nested as the recipe is."""
    settings: Settings = {}
    for key, value in values.items():
        if value is not None:
            *sections, name = key.split("__")
            place = settings
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
    return settings


@click.command(
    cls=_RecipeCommand,
    epilog=_EPILOG,
    context_settings=HELP,
    examples=[
        "trimrt compress digits --preset quick",
        "trimrt compress photos.zip --build",
        "trimrt compress photos --teacher model.onnx --teacher-preprocess imagenet",
    ],
)
@click.argument("source")
@click.option(
    "--out", type=FOLDER, help="folder for teacher/, student/ and pruned/  [default: runs/<data>-fold<k>]"
)
@click.option(
    "--fold",
    type=click.IntRange(0, 4),
    default=0,
    help="part held out for testing, where the data has no test part",
)
@click.option(
    "--preset",
    type=Choice(list(PRESETS)),
    default="aligned",
    help="; ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items()),
)
@click.option("--config", type=Existing(dir_okay=False), help="TOML file with settings")
@click.option(
    "--reuse",
    type=Existing(file_okay=False),
    help="another run's folder, to take its stages where the recipe is the same",
)
@on_damaged_option
@click.option(
    "--until",
    type=Choice(["teacher", "student", "pruned"]),
    default="pruned",
    help="the last stage to make",
)
@click.option(
    "--teacher",
    type=Existing(),
    help="a network that is there already, to distil instead of training a teacher: an ONNX file, a "
    "checkpoint's folder, or a state dict of --teacher-architecture",
)
@click.option(
    "--latency-table",
    type=Existing(dir_okay=False),
    help="for --latency-ms: a file that `trimrt measure-layers` wrote on the device that the network is for  "
    "[default: one of this machine is made]",
)
@click.option(
    "--build",
    is_flag=True,
    help="then build an engine of the last checkpoint, and of each on the way to it, as `trimrt build` does "
    "by default",
)
@options_of(Recipe)
@options_of(PrepareOptions, only=_ABOUT_TEACHER, within=("teacher",))
def compress(
    source: str,
    out: Path | None,
    fold: int,
    preset: str,
    config: Path | None,
    reuse: Path | None,
    on_damaged: OnDamaged,
    until: Role,
    teacher: Path | None,
    latency_table: Path | None,
    build: bool,
    **values: Any,
) -> None:
    """Train a teacher, distil a student from it, and prune the student.

    SOURCE is `digits`, `digits-unshuffled` (its folds keep writers apart), `fashion-mnist`, `glyphs` (letters
    and figures, whose folds keep typefaces apart), or a folder or ZIP file of images: train/ and test/ (or
    val/) with a folder for each class, or the class folders themselves, which are then split into five
    folds. All files are looked at first; what is not used, and why, is printed.

    --latency-ms, --size-mb and --macs ask for the best network within a budget, instead of a share of the
    channels: each group of channels gets the width that it needs. --front keeps networks on the way there.

    Before training begins, the time that all of it will take is estimated. Finished stages are reused and an
    interrupted one continues where it stopped. With --build, photographs become an engine in one command.
    """
    from rich.console import Console

    told = {name: values.pop(f"teacher__{name}") for name in _ABOUT_TEACHER}
    if teacher is not None and teacher.is_file() and teacher.suffix.lower() != ".onnx":
        values = {"teacher__epochs": 0} | {name: value for name, value in values.items() if value is not None}
        values["teacher__weights"], teacher = teacher, None
    given = [name for name, value in values.items() if name.startswith("teacher__") and value is not None]
    if teacher is not None and given:
        flags = ", ".join(f"--{name.replace('__', '-').replace('_', '-')}" for name in given)
        raise click.UsageError(f"--teacher {teacher} is taken as it is; leave out {flags}")
    try:
        recipe = make_recipe(preset=preset, file=config, overrides=_overrides(values))
    except RecipeError as error:
        raise click.UsageError(f"the recipe is not valid:\n{error}") from None

    if latency_table is not None and recipe.latency_ms is None:
        raise click.UsageError("--latency-table is for --latency-ms; give both")
    require_writable(out or RUNS)
    if build:
        require_writable(ENGINES)
    from models import compress as run_compression

    afterwards: Afterwards | None = None
    if build:
        from builder.rehearsal import foretell_build as afterwards
    console = Console()
    try:
        with _naming_own_options():
            run = run_compression(
                source,
                out,
                recipe,
                fold=fold,
                until=until,
                on_damaged=on_damaged,
                reuse=reuse,
                teacher=None if teacher is None else _open(teacher, told, recipe.threads),
                device=_device(latency_table) if recipe.budget else None,
                afterwards=afterwards,
                console=console,
                command=click.get_current_context().meta[_AS_TYPED],
            )
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'files'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        console.print("Interrupted. The same command continues from here.")
        raise click.Abort from None
    _print_table(console, run)
    next_command = f"trimrt build {run.checkpoint}"
    if build:
        from builder import BuildOptions
        from trimrt.build import run_build

        for checkpoint in run.pruned:
            (package,) = run_build(checkpoint, ENGINES, BuildOptions())
        next_command = f"trimrt serve --engine {package.folder}"
        took = run.progress.took()
        if took is not None:
            console.print(took, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Next:  {next_command}", markup=False, highlight=False, soft_wrap=True)


def _open(teacher: Path, told: dict[str, Any], threads: int) -> ReadyTeacher:
    from builder import open_teacher

    return open_teacher(teacher, take(PrepareOptions, told), threads=threads)


def _device(latency_table: Path | None) -> FittingDevice:
    from builder.fitting import FittingDevice
    from trimrt.display import Display

    return FittingDevice(latency_table, Display)


@contextmanager
def _naming_own_options() -> Iterator[None]:
    """Let errors about a teacher name its options here, which begin with --teacher, not `trimrt build`'s."""
    from builder.prepare.export import ExportError

    try:
        yield
    except ExportError as error:
        names = "|".join(name.replace("_", "-") for name in _ABOUT_TEACHER)
        raise click.ClickException(re.sub(rf"--({names})\b", r"--teacher-\1", str(error))) from error


def _print_table(console: Console, run: CompressionRun) -> None:
    from rich import box
    from rich.table import Table

    cards = run.cards
    console.print(
        f"\n{run.folder}, measured on {cards[0].metrics.images} test images in FP32:",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(overflow="fold")
    for column in ("params", "MACs", "accuracy", "wrong", "loss", "alive"):
        table.add_column(column, justify="right", no_wrap=True)
    for card in cards:
        metrics = card.metrics
        table.add_row(
            card.name,
            f"{metrics.parameters / 1e6:.3f} M",
            f"{metrics.macs / 1e6:.1f} M",
            f"{metrics.accuracy:.2%}",
            str(metrics.wrong),
            f"{metrics.loss:.4f}",
            f"{metrics.live_parameters:.1%}",
        )
    console.print(table)
    if cards[-1].role != "pruned":
        return
    student = next(card for card in cards if card.role == "student")
    pruned = cards[-1]
    fewer = 1 - pruned.metrics.parameters / student.metrics.parameters
    console.print(
        f"Pruning took {fewer:.1%} of the student's parameters.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for card in cards:
        for line in () if card.promise is None else card.promise.lines():
            console.print(f"{card.name}: {line}", markup=False, highlight=False, soft_wrap=True)
