"""`trimrt report`: the command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from models.bars import bars_in
from models.folders import OnDamaged
from trimrt.options import HELP, POSITIVE, Command, engine_dir_option, on_damaged_option
from trimrt.output import OutputFile, write_output
from trimrt.report.discovery import discover, locate

if TYPE_CHECKING:
    from trimrt.report import measuring
    from trimrt.report.results import Measured, Report


class _Command(Command):
    """A command that knows how it was typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = shlex.join(["trimrt", "report", *args])
        return super().parse_args(ctx, args)


@click.command(
    cls=_Command,
    context_settings=HELP,
    examples=[
        "trimrt report engines",
        "trimrt report digits-resnet18 engines --out digits.html",
        "trimrt report runs/photos-fold0 photos-resnet18-int8-openvino --data photos",
    ],
)
@click.argument("names", nargs=-1, required=True, metavar="PATH...")
@engine_dir_option
@click.option("-o", "--out", type=OutputFile(), default=Path("report.html"), help="The page.")
@click.option(
    "--data",
    help="Measure all on the test part of this data set: digits, fashion-mnist, glyphs, or an "
    "ImageFolder directory.  [default: of what each was trained on]",
)
@on_damaged_option
@click.option("--json", "json_file", type=OutputFile(), help="Write the same figures as JSON here.")
@click.option("--seconds", default=10.0, type=POSITIVE, help="Time all models in turns for so long.")
@click.option(
    "--sensitivity/--no-sensitivity",
    default=True,
    help="Rank the layers of INT8 engines; large networks take minutes.",
)
@click.pass_context
def report(
    context: click.Context,
    names: tuple[str, ...],
    engine_dir: Path,
    out: Path,
    data: str | None,
    on_damaged: OnDamaged,
    json_file: Path | None,
    seconds: float,
    sensitivity: bool,
) -> None:
    """Measure checkpoints and engine packages side by side, and write one HTML page about them.

    PATHs are checkpoints, engine packages, or folders with some in them; the name of a checkpoint or of an
    engine will do. All are run on the test images of their data set and timed in turns on this machine.
    Those that cannot run here are listed with what their build measured.
    """
    console = Console(stderr=True)
    found = discover([locate(name, engine_dir) for name in names])
    from trimrt.report.measuring import measure
    from trimrt.report.page import render

    with _progress(console) as progress:
        measured = measure(
            found,
            data=data,
            on_damaged=on_damaged,
            seconds=seconds,
            sensitivity=sensitivity,
            command=context.meta[__name__],
            progress=progress,
            note=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
        progress("drawing")
        page = render(measured)
    write_output(out, page)
    if json_file is not None:
        write_output(json_file, measured.model_dump_json(indent=2) + "\n")
    _tell(console, measured, out, len(page.encode()))


@contextmanager
def _progress(console: Console) -> Iterator[measuring.Progress]:
    columns: tuple[Any, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    # Elsewhere than on a terminal it would be an empty line.
    with bars_in(bar), bar if console.is_terminal else nullcontext():
        task = bar.add_task("", total=None)

        def show(text: str, share: float | None = None) -> None:
            bar.update(
                task, description=escape(text), total=None if share is None else 1.0, completed=share or 0
            )

        yield show


def _tell(console: Console, measured: Report, out: Path, size: int) -> None:
    for item in measured.left_out:
        console.print(f"[yellow]left out[/] {escape(item.path)}: {escape(item.reason)}", soft_wrap=True)
    for model in measured.models:
        if model.accuracy is None or model.latency is None:
            what: Measured = "accuracy" if model.accuracy is None else "latency"
            reason = model.missing[what]
            console.print(
                f"[yellow]no {what}[/] of #{model.number} {escape(model.label)}: {escape(reason)}",
                soft_wrap=True,
            )
    click.echo(f"{out}: {len(measured.models)} models, {size / 1e3:,.0f} kB")
