"""Who is compared with whom, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from benchmarks.goals import goals
from benchmarks.limit import Settings
from benchmarks.load import Round
from benchmarks.measurements import Comparison, Limit, Measurement, Results, Run, now, this_machine
from benchmarks.report import markdown, write_report
from runtime.tuning import Setting

SETTING = Setting(slots=2, threads=2, batch=4)


def measurement(throughputs: list[float], p99: float, connections: int = 8) -> Measurement:
    """Rounds of ten seconds, with five requests refused in each."""
    latencies = [(round(1000 * p99 / 2), 98), (round(1000 * p99), 2)]
    rounds = [
        Round(requests=round(10 * throughput) + 5, seconds=10, refused=5, latencies=latencies, cpu_seconds=50)
        for throughput in throughputs
    ]
    return Measurement.of("640x427", connections, rounds)


def run(
    name: str,
    measurements: list[Measurement],
    form: Literal["usual", "trimrt"] = "trimrt",
    start_seconds: float = 1,
) -> Run:
    return Run(
        name=name,
        title=name.title(),
        form=form,
        start_seconds=start_seconds,
        idle_mb=100,
        loaded_mb=200,
        installed_mb=300,
        measurements=measurements,
    )


@pytest.fixture
def results() -> Results:
    """The machine becomes slower while the run lasts, and TrimRT with it."""
    limit = Limit(
        measurements=[measurement([300, 300], 10), measurement([100, 100], 8, connections=1)],
        settings={"640x427": Settings(throughput=SETTING, latency=SETTING)},
    )
    comparisons = [
        Comparison(
            other=run("mosec", [measurement([100, 100], 50)], "usual"),
            trimrt=run("trimrt", [measurement([190, 210], 40)]),
        ),
        Comparison(
            other=limit,
            trimrt=run(
                "trimrt",
                [measurement([150, 150], 50), measurement([80, 80], 10, connections=1)],
                start_seconds=9,
            ),
        ),
        Comparison(
            other=run("litserve", [measurement([60, 40], 100)], "usual"),
            trimrt=run("trimrt", [measurement([90, 60], 60)], start_seconds=2),
        ),
    ]
    return Results(started_at=now(), machine=this_machine(), seconds=20, comparisons=comparisons)


def rows(text: str, title: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {title} ")
    ]


def test_each_is_compared_with_the_trimrt_that_it_took_turns_with(results: Results) -> None:
    text = markdown(results)

    *_, mosec = rows(text, "Mosec")
    *_, litserve = rows(text, "Litserve")
    assert (mosec[3], mosec[5]) == ("2.00 (1.90-2.10)", "0.80")
    assert (litserve[3], litserve[5]) == ("1.50 (1.50-1.50)", "0.60")


def test_trimrts_row_is_the_mean_of_its_runs(results: Results) -> None:
    speed, cost, *_ = rows(markdown(results), "Trimrt")

    assert speed[3] == f"{(200 + 150 + 75) / 3:.0f}"
    assert cost[3] == "4.00"  # (1 + 9 + 2) / 3 seconds


def test_refused_requests_do_not_count_as_answers(results: Results) -> None:
    speed, *_ = rows(markdown(results), "Litserve")

    assert speed[3] == "50"


def test_the_limit_is_compared_with_the_trimrt_that_it_took_turns_with(results: Results) -> None:
    speed, gains = rows(markdown(results), "no server")

    assert speed[1:6] == ["best loop: 2 x batch 4, 2 OpenVINO threads", "100", "300", "4.0", ""]
    assert gains[2:6] == ["0.80 (0.80-0.80)", "0.50 (0.50-0.50)", "1.25 (p50)", ""]


def test_the_written_json_is_the_run(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path, Console(quiet=True))

    assert Results.model_validate_json((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.md").read_text() == markdown(results)
    assert "</svg>" in (tmp_path / "results.svg").read_text()


def test_a_server_that_could_not_be_measured_is_named(results: Results) -> None:
    failed = results.model_copy(update={"failures": ["Ray Serve (usual): it ended before it answered"]})

    assert "Not measured" not in markdown(results)
    assert "- Ray Serve (usual): it ended before it answered" in markdown(failed)


def test_goals_are_measured_against_the_limit_and_the_best_peer(results: Results) -> None:
    found = {goal.what: goal for goal in goals(results)}

    limit = found["throughput at 8 connections to the limit's"]
    assert (limit.measured, limit.bar, limit.reached) == (pytest.approx(0.5), "at least 0.9", False)
    alone = found["latency at 1 connection to decoding and inference alone"]
    assert (alone.measured, alone.reached) == (pytest.approx(1.25), False)
    best = found["throughput at 8 connections to the best peer as its users write it"]
    assert (best.measured, best.reached) == (pytest.approx(1.5), True)  # LitServe; mosec's is 2
    assert best.bound == pytest.approx(3), "the limit gives twice what TrimRT does"
    p99 = found["p99 at 8 connections to the best peer as its users write it"]
    assert (p99.measured, p99.bar, p99.reached) == (pytest.approx(0.8), "at most 0.7", False)
    starts = found["seconds to the first answer"]
    assert (starts.measured, starts.reached) == (2, True)  # the median of 1, 2 and 9
    assert found["megabytes after all loads"].reached
    assert not [what for what in found if "given our preprocessing" in what or "12 MP" in what]


def test_goals_of_trimrt_by_itself_are_there_once_they_were_measured(results: Results) -> None:
    both = results.model_copy(update={"server_cpu_ms": 0.4, "agreement": 0.98})

    found = {goal.what: (goal.bar, goal.reached) for goal in goals(both)}

    assert len(found) == len(goals(results)) + 2
    assert found["processor ms of the server itself for one request"] == ("at most 0.5", True)
    what = "share of labels that scaled decoding of 12 MP JPEGs leaves as they are"
    assert found[what] == ("at least 0.99", False)


def test_goals_stand_in_the_report(results: Results) -> None:
    (line,) = rows(markdown(results), "throughput at 8 connections to the limit's")
    assert line == ["throughput at 8 connections to the limit's", "at least 0.9", "0.50", "no", ""]
    (line,) = rows(markdown(results), "throughput at 8 connections to the best peer as its users write it")
    assert line[-2:] == ["yes", "3.00"]


def test_what_is_possible_is_told_only_beside_the_limit(results: Results) -> None:
    peers = [comparison for comparison in results.comparisons if isinstance(comparison.other, Run)]
    without = results.model_copy(update={"comparisons": peers})
    assert not [goal for goal in goals(without) if goal.bound is not None]
    assert "cost nothing" not in markdown(without)
