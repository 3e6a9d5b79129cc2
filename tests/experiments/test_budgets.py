"""The study of widths within budgets: what its table says of networks with the same seed."""

from __future__ import annotations

from typing import Any

from experiments.budgets import UNPRUNED, Course, Results, Row, table
from experiments.results import made_here
from models.promise import Device


def row(seed: int, share: float, way: str, wrong: int) -> Row:
    return Row(
        data="glyphs",
        seed=seed,
        share=share,
        way=way,
        widths={},
        predicted_ms=share,
        parameters=1_000_000,
        macs=1,
        validation_wrong=wrong // 10,
        validation_images=100,
        test_wrong=wrong,
        test_images=1000,
    )


def lines(*rows: Row) -> list[list[str]]:
    """The cells of the table's lines, without its head."""
    device = Device(machine="a processor", cores=1, backend="openvino", precision="int8", batch=1)
    course = Course(images=1, epochs=1, fine_tuning=1)
    about: dict[str, Any] = made_here("python -m experiments.budgets")
    text = table(
        Results(**about, device=device, timed_networks=1, course=course, precision="fp32", rows=[*rows])
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_errors_are_compared_seed_by_seed() -> None:
    first, second = (100, 80), (200, 190)
    found = lines(
        row(0, 1.0, UNPRUNED, 50),
        *(row(seed, 0.5, "uniform", wrong[0]) for seed, wrong in enumerate((first, second))),
        *(row(seed, 0.5, "magnitude", wrong[1]) for seed, wrong in enumerate((first, second))),
    )
    assert [cells[5:] for cells in found if cells[0].startswith("50 %")] == [
        ["150 ± 71 of 1000", "", ""],
        ["135 ± 78 of 1000", "15 ± 7", "10.0 %"],
    ]


def test_a_seed_without_a_uniform_network_is_not_compared() -> None:
    found = lines(
        row(0, 1.0, UNPRUNED, 50),
        row(0, 0.5, "uniform", 100),
        row(0, 0.5, "magnitude", 90),
        row(1, 0.5, "magnitude", 10),
    )
    assert [cells[1] for cells in found] == ["1", "1", "1"]
    assert found[2][5:] == ["90 of 1000", "10", "10.0 %"]
