"""`trimrt loadtest`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from trimrt.options import HELP, Choice, Command, Existing
from trimrt.output import OutputFile, milliseconds, write_output


def _loads(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        loads = tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 1,8,32") from None
    if min(loads) <= 0:
        raise click.BadParameter("loads must be positive")
    return loads


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt loadtest --images photos",
        "trimrt loadtest --images photos --load 1,8,32 --html report.html",
        "trimrt loadtest --images photos --scenario server --load 50,100 --p99-ms 50",
    ],
)
@click.option("--url", default="http://127.0.0.1:8000", help="The server.")
@click.option(
    "--images",
    type=Existing(),
    required=True,
    help="A folder of images, sent in turn; or one image.",
)
@click.option(
    "--scenario",
    type=Choice(["single-stream", "multi-stream", "server", "offline", "closed-loop"]),
    default="closed-loop",
    help="As MLPerf Inference names them: one image at a time; eight to a request; Poisson arrivals; "
    "many at once. closed-loop sweeps connections.",
)
@click.option(
    "--load",
    "loads",
    callback=_loads,
    metavar="N,N,…",
    help="Loads to sweep: connections, or requests a second for the server scenario.",
)
@click.option("--duration", type=click.FloatRange(min=0.1), default=10.0, help="Seconds a load.")
@click.option("--warmup", type=click.FloatRange(min=0), default=1.0, help="Seconds not counted.")
@click.option("--engine", help="Engine to ask; the server's default one if absent.")
@click.option("--api-key", envvar="TRIMRT_API_KEY", help="Where the server asks for it.  [TRIMRT_API_KEY]")
@click.option("--seed", type=int, default=0, help="Of the arrival times.")
@click.option("--p99-ms", type=float, help="Fail if the 99th percentile is above this at any load.")
@click.option("--min-rps", type=float, help="Fail if fewer requests a second are answered at any load.")
@click.option(
    "--max-errors", type=click.FloatRange(0, 1), help="Fail if a larger share than this is not answered."
)
@click.option("--json", "json_file", type=OutputFile(), help="Write the result here.")
@click.option("--html", "html_file", type=OutputFile(), help="Write a report here.")
def loadtest(
    scenario: Any,
    loads: tuple[float, ...] | None,
    p99_ms: float | None,
    min_rps: float | None,
    max_errors: float | None,
    json_file: Path | None,
    html_file: Path | None,
    **options: Any,
) -> None:
    """Load a running server and measure what it does.

    The exit code is 1 if a threshold is missed.
    """
    from trimrt.loadtest.html import render
    from trimrt.loadtest.results import Thresholds, unit_of
    from trimrt.loadtest.runs import Plan, default_loads, run

    plan = Plan(scenario=scenario, loads=loads or default_loads(scenario), **options)
    thresholds = Thresholds(p99_ms=p99_ms, min_rps=min_rps, max_errors=max_errors)
    with _bars(unit_of(plan.scenario)) as start_point:
        report = run(plan, thresholds, start_point)
    if json_file is not None:
        write_output(json_file, report.model_dump_json(indent=2))
    if html_file is not None:
        write_output(html_file, render(report))
    _print(report)
    if report.failures:
        raise SystemExit(1)


@contextmanager
def _bars(unit: str) -> Iterator[Callable[[float], Callable[[float, int], None]]]:
    """A progress bar for every load; what is yielded begins one, and returns what moves it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    answered = TextColumn("{task.fields[answered]} answered")
    with Progress(TextColumn("{task.description}"), BarColumn(), answered, TimeElapsedColumn()) as progress:

        def start(load: float) -> Callable[[float, int], None]:
            task = progress.add_task(f"{load:g} {unit}", total=1.0, answered=0)
            return lambda share, answered: progress.update(task, completed=share, answered=answered)

        yield start


def _print(report: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    title = f"{report.scenario}: {report.engine} at {report.url}"
    caption = f"load: {report.unit}. p50 to p99.9: milliseconds for a request."
    table = Table(title=escape(title), caption=caption, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    percentiles = ("p50", "p95", "p99", "p99_9")
    headings = (name.replace("_", ".") for name in percentiles)
    for heading in ("load", "answered", "errors", "requests/s", "images/s", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in report.points:
        latencies = (getattr(point.latency_ms, name) for name in percentiles)
        table.add_row(
            f"{point.load:g}",
            str(point.answered),
            str(sum(point.errors.values())),
            f"{point.requests_per_s:.1f}",
            f"{point.images_per_s:.1f}",
            *("–" if value is None else milliseconds(value) for value in latencies),
        )
    console.print(table)
    for failure in report.failures:
        console.print(f"[bold red]missed[/] {failure}")
