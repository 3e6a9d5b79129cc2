"""Who is measured when, against whom, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from benchmarks.contenders import PEERS
from benchmarks.goals import goals
from benchmarks.limit import Limit
from benchmarks.load import Load
from benchmarks.measurements import Measurement, Results, Run, now, this_machine
from benchmarks.peers import schedule
from benchmarks.report import markdown, write_report


def run(name: str, throughput: float, p99: float, form: Literal["usual", "trimrt"] = "trimrt") -> Run:
    load = Load(
        requests=round(10 * throughput) + 5,
        seconds=10,
        failed=0,
        refused=5,
        p50=p99 / 2,
        p90=p99 / 1.1,
        p99=p99,
        longest=p99,
    )
    return Run(
        name=name,
        title=name.title(),
        form=form,
        start_seconds=1,
        idle_mb=100,
        loaded_mb=200,
        installed_mb=300,
        measurements=[Measurement(photograph="640x427", connections=8, load=load, cpu_ms=5)],
    )


@pytest.fixture
def results() -> Results:
    """TrimRT becomes slower while the run lasts, as on a machine that heats up."""
    limit = Limit(photograph="640x427", throughput=300, setting="one", cpu_ms=4, latency_ms=6)
    runs = [run("trimrt", 200, 40), run("mosec", 100, 50, "usual"), limit, run("trimrt", 100, 60)]
    return Results(
        started_at=now(), machine=this_machine(), seconds=10, runs=[*runs, run("litserve", 50, 100, "usual")]
    )


def rows(text: str, title: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {title} ")
    ]


def test_trimrt_runs_before_between_and_after_the_others() -> None:
    names = [contender.name for contender, _ in schedule([(PEERS[0], "usual"), (PEERS[1], "trimrt")])]

    assert names == ["trimrt", PEERS[0].name, "trimrt", PEERS[1].name, "trimrt"]


def test_each_is_compared_with_the_trimrt_runs_next_to_it(results: Results) -> None:
    text = markdown(results)

    *_, mosec = rows(text, "Mosec")
    *_, litserve = rows(text, "Litserve")
    assert mosec[2:4] == ["1.50", "1.00"]  # throughput (200 + 100) / 2 to 100, p99 (40 + 60) / 2 to 50
    assert litserve[2:4] == ["2.00", "0.60"]


def test_refused_requests_do_not_count_as_answers(results: Results) -> None:
    speed, *_ = rows(markdown(results), "Litserve")

    assert speed[2] == "50"


def test_the_written_json_is_the_run(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path, Console(quiet=True))

    assert Results.model_validate_json((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.md").read_text() == markdown(results)
    assert "</svg>" in (tmp_path / "results.svg").read_text()


def test_the_limit_is_compared_with_the_trimrt_runs_next_to_it(results: Results) -> None:
    *_, limit = rows(markdown(results), "no server")

    assert limit[2] == "0.50"  # (200 + 100) / 2 to 300


def test_a_server_that_could_not_be_measured_is_named(results: Results) -> None:
    failed = results.model_copy(update={"failures": ["Ray Serve (usual): it ended before it answered"]})

    assert "Not measured" not in markdown(results)
    assert "- Ray Serve (usual): it ended before it answered" in markdown(failed)


def test_goals_are_measured_against_the_limit_and_the_best_peer(results: Results) -> None:
    found = {goal.what: goal for goal in goals(results)}

    limit = found["throughput at 8 connections to the limit's"]
    assert (limit.measured, limit.bar, limit.reached) == (pytest.approx(0.5), "at least 0.9", False)
    best = found["throughput at 8 connections to the best peer as its users write it"]
    assert (best.measured, best.reached) == (pytest.approx(1.5), True)  # Mosec; Litserve's is 2
    p99 = found["p99 at 8 connections to the best peer as its users write it"]
    assert (p99.measured, p99.bar, p99.reached) == (pytest.approx(1.0), "at most 0.7", False)
    assert found["megabytes after all loads"].reached
    assert not [what for what in found if "given our preprocessing" in what or "12 MP" in what]


def test_goals_stand_in_the_report(results: Results) -> None:
    (line,) = rows(markdown(results), "throughput at 8 connections to the limit's")
    assert line == ["throughput at 8 connections to the limit's", "at least 0.9", "0.50", "no"]
