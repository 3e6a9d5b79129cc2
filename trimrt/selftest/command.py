"""`trimrt selftest`: the acceptance test of a machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime.manifest import Backend
from trimrt.options import FOLDER, HELP, Choice, Command
from trimrt.selftest.run import Result, SelfTest, choose, run


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=["trimrt selftest", "trimrt selftest --backend openvino --soak-seconds 60 --json"],
)
@click.option(
    "--backend",
    type=Choice(["auto", "tensorrt", "tensorrt-rtx", "openvino"]),
    default="auto",
    help="What to test; auto takes TensorRT or TensorRT-RTX where there is an NVIDIA GPU, else OpenVINO.",
)
@click.option(
    "--engines",
    type=FOLDER,
    help="Keep the engine packages in this folder, and test those that are there already instead of building "
    "them: an image that can only run engines tests what another built.  [default: a temporary folder]",
)
@click.option(
    "--soak-seconds", type=click.FloatRange(min=0), default=5.0, help="For the last check of each engine."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for programs.")
def selftest(
    backend: Backend | Literal["auto"], engines: Path | None, soak_seconds: float, as_json: bool
) -> None:
    """Test that TrimRT works on this machine: build a small network, run it in every way, hold its labels
    against recorded ones, time it.

    The exit code is 0 only if engines ran and nothing failed.
    """
    chosen, reason = choose() if backend == "auto" else (backend, "as asked")
    console = Console(stderr=as_json, highlight=False)
    console.print(f"{chosen} ({escape(reason)})", soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as scratch:
        test = run(
            chosen, reason, engines or Path(scratch), soak_seconds, lambda result: _tell(console, result)
        )
    if as_json:
        click.echo(test.model_dump_json(indent=2))
    _summarise(console, test)
    if not test.passed:
        click.get_current_context().exit(1)


def _tell(console: Console, result: Result) -> None:
    mark = "[green]ok[/]    " if result.passed else "[red]FAILED[/]"
    console.print(f"{mark} {result.check}: {escape(result.found)}", soft_wrap=True)


def _summarise(console: Console, test: SelfTest) -> None:
    if test.latencies:
        table = Table("precision", "CUDA graphs", box=SIMPLE_HEAD)
        for heading in ("batch", "median ms", "images/s"):
            table.add_column(heading, justify="right")
        for row in test.latencies:
            graphs = "-" if row.cuda_graphs is None else "yes" if row.cuda_graphs else "no"
            speed = f"{row.images_per_second:,.0f}"
            table.add_row(row.precision, graphs, str(row.batch), f"{row.median_ms:.3f}", speed)
        console.print(table)
    for name, value in test.machine.items():
        console.print(f"{name}: {escape(value)}", soft_wrap=True)
    failed = sum(not result.passed for result in test.results)
    if test.passed:
        console.print(f"[green]passed[/]: {len(test.results)} checks, {test.engines} engines")
    else:
        nothing = "" if test.engines else "; no engine ran"
        console.print(f"[red]FAILED[/]: {failed} of {len(test.results)} checks{nothing}")
