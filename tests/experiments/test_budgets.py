"""The study of widths within budgets: what its table says of networks with the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.budget_results import UNPRUNED, Course, Results, Row, equal_accuracy, table
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


def lines(*rows: Row, table: Callable[[Results], str] = table) -> list[list[str]]:
    """The cells of a table's lines, without its head."""
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


def test_the_fastest_network_of_each_way_that_is_as_accurate_is_told() -> None:
    """Of 1000 images 100 are wrong, so a standard error is 9.5 of them."""
    found = lines(
        row(0, 1.0, UNPRUNED, 100),
        row(0, 0.6, "aggressive", 111),
        row(0, 0.5, "uniform", 109),
        row(0, 0.3, "uniform", 110),
        row(0, 0.3, "magnitude", 101),
        row(0, 0.2, "magnitude", 109),
        row(0, 0.1, "magnitude", 200),
        table=equal_accuracy,
    )
    assert found == [
        ["`glyphs`, unpruned", "1.000", "100 of 1000", "109"],
        ["preset `aggressive`", "none", "", ""],
        ["the same share of each group's channels", "0.500", "109 of 1000", ""],
        ["chosen by the weights' squares", "0.200", "109 of 1000", ""],
    ]


def test_a_network_that_lacks_a_seed_is_not_called_as_accurate() -> None:
    unpruned = [row(seed, 1.0, UNPRUNED, 100) for seed in range(2)]
    found = lines(*unpruned, row(0, 0.5, "magnitude", 90), table=equal_accuracy)
    assert found[1][:2] == ["chosen by the weights' squares", "none"]
