"""Where a training step's time goes: a small one is measured, and the table compares with the first way."""

from __future__ import annotations

from typing import Any

from experiments.results import made_here
from experiments.training_cost import Case, Layout, Results, measure, table
from models.recipe import TrainingPrecision


def case(layout: Layout, precision: TrainingPrecision, ms: float) -> Case:
    seconds = {"augmentation": 0.1 * ms, "forward": 0.3 * ms, "backward": 0.5 * ms, "optimiser": 0.1 * ms}
    return Case(
        architecture="resnet18",
        side=24,
        batch_size=64,
        layout=layout,
        precision=precision,
        seconds={part: each / 1000 for part, each in seconds.items()},
        peak_mb=1500,
    )


def test_all_parts_of_a_step_are_timed() -> None:
    found = measure("resnet18", 8, 2, "channels last", "fp32", steps=1)
    assert list(found.seconds) == ["augmentation", "forward", "backward", "optimiser"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.peak_mb > 100


def test_ways_are_compared_with_the_first_of_the_same_network() -> None:
    about: dict[str, Any] = made_here("python -m experiments.training_cost")
    cases = [case("contiguous", "fp32", 100), case("channels last", "bf16", 40)]
    lines = table(Results(**about, threads=1, cases=cases)).splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        [
            "resnet18, 64 images of 24x24: contiguous, fp32",
            "100",
            "1.00x",
            "80.0 %",
            "10.0 %",
            "10.0 %",
            "1.50 GB",
        ],
        [
            "resnet18, 64 images of 24x24: channels last, bf16",
            "40",
            "2.50x",
            "80.0 %",
            "10.0 %",
            "10.0 %",
            "1.50 GB",
        ],
    ]
