"""What pruned engines are compared with, and which goals stand in the report."""

from __future__ import annotations

from benchmarks.measurements import this_machine
from benchmarks.presets import Speeds, goals, markdown
from trimrt.bench.timing import Timing


def timing(batch: int, p50: float) -> Timing:
    return Timing(
        batch=batch,
        runs=10,
        throughput=1000 * batch / p50,
        mean_ms=p50,
        min_ms=p50,
        max_ms=p50,
        percentiles_ms={"p50": p50},
        device_ms={},
    )


SPEEDS = Speeds(
    machine=this_machine(),
    engines={
        name: [timing(1, one), timing(8, eight)]
        for name, one, eight in (("fp32", 30, 240), ("int8", 10, 80), ("report", 9, 81), ("aggressive", 1, 8))
    },
)


def test_int8_is_measured_against_fp32_and_pruned_engines_against_int8() -> None:
    assert [(goal.what, goal.bar, round(goal.measured, 2), goal.reached) for goal in goals(SPEEDS)] == [
        ("int8, batch 1: times as fast as fp32", "at least 1", 3.0, True),
        ("int8, batch 8: times as fast as fp32", "at least 1", 3.0, True),
        ("report, batch 1: times as fast as int8", "at least 1", 1.11, True),
        ("report, batch 8: times as fast as int8", "at least 1", 0.99, False),
        ("aggressive, batch 1: times as fast as int8", "at least 1", 10.0, True),
        ("aggressive, batch 8: times as fast as int8", "at least 1", 10.0, True),
    ]


def test_the_report_names_the_machine_and_says_which_goals_were_reached() -> None:
    first, *lines = markdown(SPEEDS).splitlines()
    assert first.startswith(str(this_machine()))
    assert "| report | 9.00 | 3.33 | 1.11 | 81.00 | 2.96 | 0.99 |" in lines
    assert "| report, batch 8: times as fast as int8 | at least 1 | 0.99 | no |" in lines
