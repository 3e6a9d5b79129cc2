"""What pruning is worth at 224x224: `python -m benchmarks.presets`.

A ResNet18 and what each preset leaves of it, as INT8 engines, beside the unpruned FP32 engine. The
weights are random: they do not change how long a network takes.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

import click
from pydantic import BaseModel
from rich.console import Console

from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD
from benchmarks.engine import PRUNED, build, usable
from benchmarks.goals import Goal
from benchmarks.measurements import Machine, this_machine
from benchmarks.report import goals_table, markdown_table, write_report
from runtime.engine import Options
from runtime.loading import load_engine
from runtime.manifest import Precision
from trimrt.bench.timing import ROUNDS, Timing, time_engines
from trimrt.options import HELP

BATCHES: Final = (1, 8)

_NETWORKS: Final[tuple[tuple[str, Precision], ...]] = (
    ("resnet18", "fp32"),
    ("resnet18", "int8"),
    *((f"resnet18-{preset}", "int8") for preset in PRUNED),
)


class Speeds(BaseModel):
    """Timings of all engines, all cores on one batch; in the order of `BATCHES`."""

    machine: Machine
    engines: dict[str, list[Timing]]


def markdown(speeds: Speeds) -> str:
    """The timings, each engine beside the unpruned FP32 and INT8 ones, and the goals."""
    names = list(speeds.engines)
    head = ["engine"]
    for batch in BATCHES:
        head += [f"batch {batch}: ms", "x FP32", "x INT8"]
    rows = []
    for name, timings in speeds.engines.items():
        row = [name]
        for number in range(len(timings)):
            median, fp32, int8 = (_median(speeds, other, number) for other in (name, *names[:2]))
            row += [f"{median:.2f}", f"{fp32 / median:.2f}", f"{int8 / median:.2f}"]
        rows.append(row)
    lines = [f"{speeds.machine}; all cores on one batch, median of its runs.", ""]
    lines += [*markdown_table(head, rows, left=1), *goals_table(goals(speeds))]
    return "\n".join(lines) + "\n"


def goals(speeds: Speeds) -> list[Goal]:
    """Whether every engine is at least as fast as the one that it was made smaller from.

    How many times as fast it can be depends on the processor, so no bar says how many: for four products of
    integers, where FP32 takes four instructions, VNNI takes one, AVX2 three, and AMX a small part of one.
    """
    fp32, int8, *pruned = speeds.engines
    pairs = [(int8, fp32), *((name, int8) for name in pruned)]
    return [
        Goal(
            f"{name}, batch {batch}: times as fast as {other}",
            1,
            None,
            _median(speeds, other, number) / _median(speeds, name, number),
        )
        for name, other in pairs
        for number, batch in enumerate(BATCHES)
    ]


def _median(speeds: Speeds, name: str, number: int) -> float:
    return speeds.engines[name][number].percentiles_ms["p50"]


@click.command(context_settings=HELP)
@click.option("--seconds", default=4.0, help="For each engine and batch size.")
@output_option("presets.json and presets.md")
def main(seconds: float, output: Path) -> None:
    """Time a ResNet18 at 224x224 before and after pruning by each preset."""
    folder = BUILD / "presets"
    folders = [folder / f"{name}-{precision}-openvino" for name, precision in _NETWORKS]
    with steps() as progress, ExitStack() as stack:
        task = progress.add_task("", total=len(_NETWORKS) + ROUNDS * len(BATCHES))
        for network, package in zip(_NETWORKS, folders, strict=True):
            progress.update(task, description=f"building {package.name}")
            if not usable(package):
                build([network], folder, folder / "work", lambda _line: None)
            progress.advance(task)
        engines = [stack.enter_context(closing(load_engine(path, Options(slots=1)))) for path in folders]
        speeds = Speeds(machine=this_machine(), engines={path.name: [] for path in folders})
        for batch in BATCHES:
            progress.update(task, description=f"batch {batch}")
            timings = time_engines(
                engines, batch, seconds=seconds, warm_up=0.5, progress=lambda: progress.advance(task)
            )
            for measured, timing in zip(speeds.engines.values(), timings, strict=True):
                measured.append(timing)
    write_report(speeds, markdown(speeds), output / "presets.json", Console())


if __name__ == "__main__":
    main()
