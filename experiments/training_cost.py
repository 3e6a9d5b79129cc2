"""Where the time and the memory of a training step go, and what its layout and precision save.

    python -m experiments.training_cost

The steps are those of `models.training`: augmentation, forward and backward pass, AdamW. Each case runs in a
process of its own, so that its largest memory is its own too. The images are noise.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final, Literal

import click
import torch
from pydantic import BaseModel, Field
from torch.nn import functional

from experiments.markdown import table as markdown_table
from experiments.results import FOLDER, Made, made_here
from models.augmentation import random_affines, transform
from models.defaults import PHOTO_SIDE
from models.evaluation import normalise, to_float
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.recipe import Augmentation, TrainingPrecision
from models.training import mixed_precision, reproducible
from trimrt.options import COUNT, FILE, HELP

Layout = Literal["contiguous", "channels last"]

_CLASSES: Final = 10
_CASES: Final = (  # architecture, side of the images, batch size
    ("resnet50", 24, 64),
    ("resnet18", 24, 64),
    ("resnet34", 128, 16),
    ("resnet50", 128, 64),
)
_WAYS: Final[tuple[tuple[Layout, TrainingPrecision], ...]] = (
    ("contiguous", "fp32"),
    ("channels last", "fp32"),
    ("channels last", "bf16"),
)
_CPU: Final = torch.device("cpu")


class Case(BaseModel):
    """One network, trained in one way."""

    architecture: str
    side: int = Field(description="of the images, pixels")
    batch_size: int
    layout: Layout
    precision: TrainingPrecision
    seconds: dict[str, float] = Field(description="of each part of a step, the least of all steps")
    peak_mb: float = Field(description="the most that the process held")

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


class Results(Made):
    """All cases."""

    threads: int
    cases: list[Case]


def measure(
    architecture: str, side: int, batch_size: int, layout: Layout, precision: TrainingPrecision, *, steps: int
) -> Case:
    """Take some steps, of which the first is not counted: it sets everything up.

    The most that the process held before counts too, so call it in a process of its own.
    """
    torch.manual_seed(0)
    spec = Preprocessing(resize=side, height=side, width=side)
    network = build_network(architecture, _CLASSES, "small" if side < PHOTO_SIDE else "standard").train()
    network.to(memory_format=torch.channels_last if layout == "channels last" else torch.contiguous_format)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    pixels = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8).numpy()
    targets = torch.randint(0, _CLASSES, (batch_size,))
    found: list[dict[str, float]] = []
    for step in range(1 + steps):
        laps = _Laps()
        affines = random_affines(batch_size, Augmentation(), step)
        images = normalise(transform(to_float(pixels, _CPU), affines), spec)
        laps.end("augmentation")
        with mixed_precision(precision, _CPU):
            logits = network(images).float()
        laps.end("forward")
        optimizer.zero_grad()
        functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
        laps.end("backward")
        optimizer.step()
        laps.end("optimiser")
        found.append(laps.seconds)
    return Case(
        architecture=architecture,
        side=side,
        batch_size=batch_size,
        layout=layout,
        precision=precision,
        seconds={part: round(min(each[part] for each in found[1:]), 5) for part in found[0]},
        peak_mb=round(_peak_mb(), 1),
    )


class _Laps:
    """Seconds between one part of a step and the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        """A part ends, and the next begins."""
        now = time.perf_counter()
        self.seconds[part], self._last = now - self._last, now


def _peak_mb() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) / 1000


def table(results: Results) -> str:
    """Markdown: a line for each case, whose first way is what the others are compared with."""
    rows, first = [], results.cases[0]
    for case in results.cases:
        if (case.architecture, case.side) != (first.architecture, first.side):
            first = case
        network = f"{case.architecture}, {case.batch_size} images of {case.side}x{case.side}"
        convolutions = case.seconds["forward"] + case.seconds["backward"]
        rows.append(
            [
                f"{network}: {case.layout}, {case.precision}",
                f"{1000 * case.step_s:.0f}",
                f"{first.step_s / case.step_s:.2f}x",
                *(
                    f"{100 * share / case.step_s:.1f} %"
                    for share in (convolutions, case.seconds["augmentation"], case.seconds["optimiser"])
                ),
                f"{case.peak_mb / 1000:.2f} GB",
            ]
        )
    head = ["", "step, ms", "", "forward and backward", "augmentation", "optimiser", "largest memory"]
    return markdown_table(head, rows)


@click.command(context_settings=HELP)
@click.option("--steps", type=COUNT, default=5, help="Of each case, after one that is not counted.")
@click.option("--threads", type=COUNT, default=1)
@click.option(
    "--out",
    type=FILE,
    default=FOLDER / "training-cost.json",
    show_default="experiments/results/training-cost.json",
)
def main(steps: int, threads: int, out: Path) -> None:
    """Time training steps on this machine, which should have nothing else to do."""
    cases = []
    for architecture, side, batch_size in _CASES:
        for layout, precision in _WAYS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                case = process.submit(
                    _measure_alone, (architecture, side, batch_size, layout, precision), steps, threads
                ).result()
            click.echo(
                f"{architecture} {side} {layout} {precision}: {1000 * case.step_s:.0f} ms, {case.peak_mb} MB"
            )
            cases.append(case)
    command = f"python -m experiments.training_cost --steps {steps} --threads {threads}"
    results = Results(**made_here(command), threads=threads, cases=cases)
    results.write(out)
    click.echo(table(results))


def _measure_alone(what: tuple[str, int, int, Layout, TrainingPrecision], steps: int, threads: int) -> Case:
    with reproducible(threads):
        return measure(*what, steps=steps)


if __name__ == "__main__":
    main()
