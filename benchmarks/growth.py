"""How TrimRT grows with image size, concurrency and batch: `python -m benchmarks.growth`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import click
from pydantic import BaseModel
from rich.console import Console

from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD, TRIMRT
from benchmarks.engine import FP32, INT8, prepare
from benchmarks.load import Load
from benchmarks.measurements import Machine, this_machine
from benchmarks.photos import photographs, store
from benchmarks.processes import exit_on_sigterm
from benchmarks.report import markdown_table, write_report
from benchmarks.serving import serving
from runtime.loading import load_engine
from trimrt.bench.timing import Timing, time_engines
from trimrt.options import HELP

MEGAPIXELS: Final = (0.1, 0.27, 1.0, 3.0, 6.0, 12.0, 24.0)
CONNECTIONS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCHES: Final = (1, 2, 4, 8, 16, 32)

_SIZE_CONNECTIONS: Final = 8


class Point(BaseModel):
    """One load."""

    at: float
    load: Load
    cpu_ms: float


class Growth(BaseModel):
    """The three curves."""

    machine: Machine
    seconds: float
    sizes: list[Point] = []
    connections: list[Point] = []
    batches: dict[str, list[Timing]] = {}


def markdown(growth: Growth) -> str:
    """The curves as tables."""
    lines = [f"{growth.machine}; {growth.seconds:g} s a load.", ""]
    lines += [f"JPEGs of so many megapixels, {_SIZE_CONNECTIONS} connections:", ""]
    lines += _loads("megapixels", growth.sizes)
    lines += ["", "640x427 JPEGs, so many connections:", ""]
    lines += _loads("connections", growth.connections)
    lines += ["", "Engines by themselves, all cores, batches of so many images:", ""]
    head = ["batch", *(f"{name}: {what}" for name in growth.batches for what in ("images/s", "p50 ms"))]
    rows = []
    for timings in zip(*growth.batches.values(), strict=True):
        row = [str(timings[0].batch)]
        for timing in timings:
            row += [f"{timing.throughput:.0f}", f"{timing.percentiles_ms['p50']:.2f}"]
        rows.append(row)
    return "\n".join([*lines, *markdown_table(head, rows, left=0)]) + "\n"


def _loads(title: str, points: Sequence[Point]) -> list[str]:
    head = [title, "images/s", "p50 ms", "p99 ms", "CPU ms an image", "refused", "failed"]
    rows = [
        [
            f"{point.at:g}",
            f"{point.load.throughput:.1f}",
            f"{point.load.p50:.1f}",
            f"{point.load.p99:.1f}",
            f"{point.cpu_ms:.2f}",
            str(point.load.refused),
            str(point.load.failed),
        ]
        for point in points
    ]
    return markdown_table(head, rows, left=0)


def plot(growth: Growth, path: Path) -> None:
    """The curves as a figure."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    curves = ((axes[0], growth.sizes, "megapixels"), (axes[1], growth.connections, "connections"))
    for axis, points, title in curves:
        axis.plot([point.at for point in points], [point.load.throughput for point in points], marker="o")
        axis.set_xlabel(title)
        axis.set_ylabel("images a second")
        axis.set_xscale("log", base=2 if title == "connections" else 10)
        axis.set_ylim(bottom=0)
    for name, timings in growth.batches.items():
        axes[2].plot(
            [timing.batch for timing in timings],
            [timing.throughput for timing in timings],
            marker="o",
            label=name,
        )
    axes[2].set_xlabel("batch, engine by itself")
    axes[2].set_xscale("log", base=2)
    axes[2].set_ylim(bottom=0)
    axes[2].legend(fontsize=7)
    for axis, ticks in zip(axes, (MEGAPIXELS, CONNECTIONS, BATCHES), strict=True):
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


@click.command(context_settings=HELP)
@click.option("--seconds", default=8.0, help="Length of each load.")
@output_option("growth.json, growth.md and growth.svg")
def main(seconds: float, output: Path) -> None:
    """Measure how TrimRT grows with image size, concurrency and batch."""
    exit_on_sigterm()
    TRIMRT.install()
    engines = prepare(BUILD / "engine", click.echo)
    folder = BUILD / "photographs"
    small = store("640x427", photographs(), folder)
    growth = Growth(machine=this_machine(), seconds=seconds)
    # As many as the most connections: the curve is to show how it queues, not how it refuses.
    settings = {"TRIMRT_QUEUE_LIMIT": str(2 * max(CONNECTIONS))}
    with steps() as progress:
        task = progress.add_task("", total=len(MEGAPIXELS) + len(CONNECTIONS) + len(BATCHES))
        with serving(TRIMRT, "trimrt", engines, small[0].read_bytes(), settings) as server:
            server.load(small, _SIZE_CONNECTIONS, min(2, seconds))
            for megapixels in MEGAPIXELS:
                progress.update(task, description=f"{megapixels:g} megapixels")
                files = store(f"{megapixels:g}MP", photographs(megapixels), folder)
                load, cpu_ms = server.load(files, _SIZE_CONNECTIONS, seconds)
                growth.sizes.append(Point(at=megapixels, load=load, cpu_ms=cpu_ms))
                progress.advance(task)
            for connections in CONNECTIONS:
                progress.update(task, description=f"{connections} connections")
                load, cpu_ms = server.load(small, connections, seconds)
                growth.connections.append(Point(at=connections, load=load, cpu_ms=cpu_ms))
                progress.advance(task)
        with closing(load_engine(engines / FP32)) as fp32, closing(load_engine(engines / INT8)) as int8:
            growth.batches = {"FP32": [], "INT8": []}
            for batch in BATCHES:
                progress.update(task, description=f"batch {batch}")
                timings = time_engines(
                    [fp32, int8], batch, seconds=seconds / 2, warm_up=0.5, progress=lambda: None
                )
                for curve, timing in zip(growth.batches.values(), timings, strict=True):
                    curve.append(timing)
                progress.advance(task)
    write_report(growth, markdown(growth), output / "growth.json", Console())
    plot(growth, output / "growth.svg")


if __name__ == "__main__":
    main()
