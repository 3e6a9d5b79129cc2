"""`trimrt bench`: engines by themselves, side by side, as trtexec times one."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import click
from pydantic import BaseModel, Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.preprocessing import ImageError, load_pixels
from runtime.engine import Engine, Options
from runtime.loading import load_engine
from runtime.manifest import Precision, read_manifest
from runtime.packages import resolve_package
from runtime.profiling import Layer, profile_layers
from runtime.tuning import TUNING_NAME
from trimrt.bench.timing import PERCENTILES, ROUNDS, Timing, time_engines
from trimrt.bench.tuning import sample_photographs, tune
from trimrt.options import COUNT, HELP, POSITIVE, Command, Existing, engine_dir_option
from trimrt.output import OutputFile, milliseconds, write_output

_SHOWN_LAYERS = 20


class EngineReport(BaseModel):
    """What was measured of one engine package."""

    engine: str = Field(description="the package's folder")
    name: str
    backend: str
    precision: Precision
    slots: int = Field(description="batches that ran at once")
    timings: list[Timing] = []
    layers: list[Layer] | None = Field(
        default=None, description="of the largest batch; None unless asked for"
    )


class Report(BaseModel):
    """All that one call measured."""

    seconds: float = Field(description="for each engine at each batch size")
    engines: list[EngineReport]


def _batches(_context: click.Context, _parameter: click.Parameter, value: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,8") from None
    if sizes[0] < 1:
        raise click.BadParameter("a batch has at least one image")
    return sizes


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt bench digits-resnet18-fp32-openvino digits-resnet18-int8-openvino",
        "trimrt bench digits-resnet18-int8-openvino --batch 1,4,16 --profile",
        "trimrt bench --tune digits-resnet18-int8-openvino",
    ],
)
@click.argument("engines", nargs=-1, required=True, metavar="ENGINE...")
@engine_dir_option
@click.option("--batch", "batches", default="1,8", callback=_batches, help="Batch sizes.")
@click.option("--seconds", default=3.0, type=POSITIVE, help="For each engine and size.")
@click.option("--warm-up", default=0.5, type=click.FloatRange(min=0), help="Seconds before that.")
@click.option("--slots", default=1, type=COUNT, help="Batches at once.")
@click.option("--threads", type=COUNT, help="CPU threads for all slots together; all if not given.")
@click.option("--profile", is_flag=True, help="Also time every layer, at the largest of the sizes.")
@click.option(
    "--tune",
    "tuning",
    is_flag=True,
    help="Instead, try slots, threads, pinning and batch sizes, and keep what serves most in each package.",
)
@click.option(
    "--photo",
    "photos",
    multiple=True,
    type=Existing(dir_okay=False),
    help="An image like those that will be served, to tune with; may be repeated.",
)
@click.option("--json", "output", type=OutputFile(), help="Write JSON here.")
def bench(
    engines: tuple[str, ...],
    engine_dir: Path,
    batches: list[int],
    seconds: float,
    warm_up: float,
    slots: int,
    threads: int | None,
    profile: bool,
    tuning: bool,
    photos: tuple[Path, ...],
    output: Path | None,
) -> None:
    """Time engine packages by themselves: no decoding, no HTTP.

    ENGINEs are packages' folders or names. Several are timed in turns, so that they are comparable even on
    an unsteady machine. --tune is for once, on the machine that will serve.
    """
    folders = tuple(resolve_package(engine, engine_dir) for engine in engines)
    if tuning:
        _tune(folders, photos, Console())
        return
    options = Options(slots=slots, threads=threads)
    _check_sizes(folders, batches)
    report = _time(folders, batches, seconds, warm_up, options)
    if profile:
        for folder, measured in zip(folders, report.engines, strict=True):
            measured.layers = profile_layers(folder, batches[-1], runs=50)
    if output is not None:
        write_output(output, report.model_dump_json(indent=2) + "\n")
    _print(report, Console())


def _tune(folders: tuple[Path, ...], photos: tuple[Path, ...], console: Console) -> None:
    given = [(photo, photo.read_bytes()) for photo in photos]
    for folder in folders:
        _check_tunable(folder, given)
    photographs = [data for _, data in given] or sample_photographs()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    for folder in folders:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"tuning {escape(folder.name)}", total=1.0)
            tuning = tune(
                folder,
                photographs,
                progress=lambda share, task=task: progress.update(task, completed=share),  # type: ignore[misc]
            )
        table = Table("slots", "threads", "pinned", "largest batch", "images/s", box=SIMPLE_HEAD)
        for trial in sorted(tuning.trials, key=lambda trial: -trial.throughput):
            setting = trial.setting
            table.add_row(
                str(setting.slots),
                str(setting.threads),
                "yes" if setting.pinning else "no",
                str(setting.batch),
                f"{trial.throughput:.1f}" + ("  chosen" if setting == tuning.setting else ""),
            )
        console.print(table)
        console.print(f"{folder / TUNING_NAME} is used from now on, on machines like this", highlight=False)


def _check_tunable(folder: Path, photographs: list[tuple[Path, bytes]]) -> None:
    """Find out now that something is wrong, not after minutes of work."""
    spec = read_manifest(folder).preprocessing
    if not os.access(folder, os.W_OK):
        raise click.ClickException(f"cannot write {folder / TUNING_NAME}; tune a copy of the package")
    for photo, data in photographs:
        try:
            load_pixels(data, spec)
        except ImageError as error:
            raise click.ClickException(f"{photo}: {error}") from error


def _check_sizes(folders: tuple[Path, ...], batches: list[int]) -> None:
    for folder in folders:
        sizes = read_manifest(folder).batch
        if wrong := [batch for batch in batches if not sizes.min <= batch <= sizes.max]:
            raise click.BadParameter(
                f"{folder} takes batches of {sizes.min} to {sizes.max}, not {', '.join(map(str, wrong))}",
                param_hint="'--batch'",
            )


def _time(
    folders: tuple[Path, ...], batches: list[int], seconds: float, warm_up: float, options: Options
) -> Report:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with ExitStack() as stack, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=ROUNDS * len(batches))
        engines: list[Engine] = []
        for folder in folders:
            engines.append(load_engine(folder, options))
            stack.callback(engines[-1].close)
        reports = [
            EngineReport(
                engine=str(folder),
                name=engine.manifest.name,
                backend=engine.manifest.backend,
                precision=engine.manifest.precision,
                slots=engine.slots,
            )
            for folder, engine in zip(folders, engines, strict=True)
        ]
        for batch in batches:
            progress.update(task, description=f"batch {batch}")
            timings = time_engines(
                engines, batch, seconds=seconds, warm_up=warm_up, progress=lambda: progress.advance(task)
            )
            for report, timing in zip(reports, timings, strict=True):
                report.timings.append(timing)
    return Report(seconds=seconds, engines=reports)


def _print(report: Report, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, caption="p50 to p99: milliseconds for a batch", pad_edge=False)
    table.add_column("engine", overflow="fold")
    for title in ("batch", "images/s", "x first", *(f"p{share}" for share in PERCENTILES)):
        table.add_column(title, justify="right", no_wrap=True)
    for number, first in enumerate(report.engines[0].timings):
        for engine in report.engines:
            timing = engine.timings[number]
            table.add_row(
                escape(engine.name),
                str(timing.batch),
                f"{timing.throughput:.1f}",
                f"{timing.throughput / first.throughput:.2f}",
                *(milliseconds(timing.percentiles_ms[f"p{share}"]) for share in PERCENTILES),
            )
    console.print(table)
    _print_device(report, console)
    for engine in report.engines:
        if engine.layers is not None:
            _print_layers(engine, engine.layers, console)


def _print_device(report: Report, console: Console) -> None:
    """The device's own stages, where it tells them: a table of their own, for the first has no room."""
    stages = sorted(
        {stage for engine in report.engines for each in engine.timings for stage in each.device_ms}
    )
    if not stages:
        return
    table = Table(box=SIMPLE_HEAD, caption="milliseconds of the device, medians", pad_edge=False)
    table.add_column("engine", overflow="fold")
    for title in ("batch", *stages):
        table.add_column(title, justify="right", no_wrap=True)
    for engine in report.engines:
        for timing in engine.timings:
            times = (timing.device_ms.get(stage) for stage in stages)
            table.add_row(
                escape(engine.name), str(timing.batch), *("" if ms is None else f"{ms:.3f}" for ms in times)
            )
    console.print(table)


def _print_layers(engine: EngineReport, layers: list[Layer], console: Console) -> None:
    total = sum(layer.mean_ms for layer in layers)
    slowest = sorted(layers, key=lambda layer: -layer.mean_ms)[:_SHOWN_LAYERS]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("layer", "kind", "kernel"):
        table.add_column(title, overflow="fold")
    table.title = (
        f"{escape(engine.name)}, batch {engine.timings[-1].batch}: the {len(slowest)} slowest layers"
    )
    table.title += f" of {len(layers)}, {total:.2f} ms in all"
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for layer in slowest:
        share = layer.mean_ms / total if total else 0
        # Of OpenVINO's names neither the part that all share nor what its transformations add says anything.
        name = layer.name.removeprefix("network/").split("/WithoutBiases")[0]
        table.add_row(escape(name), layer.kind, layer.kernel, f"{layer.mean_ms:.3f}", f"{share:.1%}")
    console.print(table)
