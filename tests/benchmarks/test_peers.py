"""Who is compared with whom, and what is written."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import click
import pytest
from rich.console import Console

import benchmarks
from benchmarks.contenders import WAYS
from benchmarks.goals import goals
from benchmarks.limit import Settings
from benchmarks.load import Round
from benchmarks.measurements import DIGIT, Comparison, Limit, Measurement, Results, Run, this_machine
from benchmarks.peers import contenders, resume
from benchmarks.render import render
from benchmarks.report import markdown, plot, write_report
from runtime.tuning import Setting

RESULTS = Path(benchmarks.__file__).parent / "results"
SETTING = Setting(slots=2, threads=2, batch=4)


def measurement(
    throughputs: list[float], p99: float, connections: int = 8, photograph: str = "640x427"
) -> Measurement:
    """Rounds of ten seconds, with five requests refused in each."""
    latencies = [(round(1000 * p99 / 2), 98), (round(1000 * p99), 2)]
    rounds = [
        Round(requests=round(10 * throughput) + 5, seconds=10, refused=5, latencies=latencies, cpu_seconds=50)
        for throughput in throughputs
    ]
    return Measurement.of(photograph, connections, rounds)


def run(
    name: str,
    measurements: list[Measurement],
    form: Literal["usual", "trimrt"] = "trimrt",
    start_seconds: float = 1,
    loaded_mb: float = 200,
) -> Run:
    return Run(
        name=name,
        title=name.title(),
        form=form,
        start_seconds=start_seconds,
        idle_mb=100,
        loaded_mb=loaded_mb,
        installed_mb=300,
        measurements=measurements,
    )


def measured(speed: float = 1) -> Results:
    """Two peers and the limit, on a machine of that speed.

    The machine becomes slower while the run lasts, and TrimRT with it.
    """

    def loads(throughputs: list[float], p99: float, connections: int = 8) -> Measurement:
        return measurement([speed * one for one in throughputs], p99 / speed, connections)

    limit = Limit(
        measurements=[loads([300, 300], 10), loads([100, 100], 8, connections=1)],
        settings={"640x427": Settings(throughput=SETTING, latency=SETTING)},
    )
    comparisons = [
        Comparison(
            other=run("mosec", [loads([100, 100], 50)], "usual", loaded_mb=900),
            trimrt=run("trimrt", [loads([190, 210], 40)]),
        ),
        Comparison(
            other=limit,
            trimrt=run(
                "trimrt",
                [loads([150, 150], 50), loads([80, 80], 10, connections=1)],
                start_seconds=9,
                loaded_mb=400,
            ),
        ),
        Comparison(
            other=run("litserve", [loads([60, 40], 100)], "usual", loaded_mb=900),
            trimrt=run("trimrt", [loads([90, 60], 60)], start_seconds=2, loaded_mb=210),
        ),
    ]
    machine = this_machine().model_copy(update={"cores": 2})
    return Results(
        started_at=datetime.now(timezone.utc), machine=machine, seconds=20, comparisons=comparisons
    )


@pytest.fixture
def results() -> Results:
    return measured()


def compared(results: Results, other: Run | Limit, ours: list[Measurement]) -> Results:
    """The same run with one more comparison."""
    more = Comparison(other=other, trimrt=run("trimrt", ours))
    return results.model_copy(update={"comparisons": [*results.comparisons, more]})


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
    write_report(results, markdown(results), tmp_path / "results.json", Console(quiet=True))
    plot(results, tmp_path / "results.svg")

    assert Results.model_validate_json((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.md").read_text() == markdown(results)
    assert "</svg>" in (tmp_path / "results.svg").read_text()


def test_a_server_that_could_not_be_measured_is_named(results: Results) -> None:
    failed = results.model_copy(update={"failures": ["Ray Serve (usual): it ended before it answered"]})

    assert "Not measured" not in markdown(results)
    assert "- Ray Serve (usual): it ended before it answered" in markdown(failed)


def test_goals_compare_trimrt_with_what_it_took_turns_with(results: Results) -> None:
    assert [(goal.what, goal.bar, round(goal.measured, 3), goal.reached) for goal in goals(results)] == [
        # 5 ms instead of 4
        ("latency at 1 connection to decoding and inference alone", "at most 1.2", 1.25, False),
        # 150 images a second instead of 300
        ("640x427, 8 connections: throughput to the limit's", "at least 0.9", 0.5, False),
        # 50 ms, in which the limit does 15 images
        ("640x427, 8 connections: p99 to the limit's time for 8 images", "at most 2", 1.875, True),
        # 75 instead of LitServe's 50; mosec had 100, beside 200
        ("640x427, 8 connections: throughput to the best peer's", "at least 1", 1.5, True),
        # the median of TrimRT's 200, 210 and 400
        ("megabytes after all loads", "at most 300", 210, True),
    ]


def test_goals_do_not_depend_on_how_fast_the_machine_is(results: Results) -> None:
    slow = goals(measured(speed=0.25))

    assert [goal.what for goal in slow] == [goal.what for goal in goals(results)]
    assert [goal.measured for goal in slow] == pytest.approx([goal.measured for goal in goals(results)])


def test_a_server_that_costs_nothing_would_be_ahead_of_the_best_peer_by_the_limits_gain(
    results: Results,
) -> None:
    assert [goal.bound for goal in goals(results) if "best peer" in goal.what] == [pytest.approx(3)]
    (line,) = rows(markdown(results), "640x427, 8 connections: throughput to the best peer's")
    assert line[1:] == ["at least 1", "1.50", "yes", "3.00"]


def test_a_faster_peer_in_either_form_misses_the_goal(results: Results) -> None:
    faster = compared(results, run("fastapi", [measurement([250], 40)]), [measurement([200], 40)])

    (goal,) = (goal for goal in goals(faster) if "best peer" in goal.what)
    assert (goal.measured, goal.bound, goal.reached) == (pytest.approx(0.8), pytest.approx(1.6), False)


def test_a_peer_that_the_limit_is_hardly_ahead_of_is_no_goal(results: Results) -> None:
    """TrimRT gives half of what the limit does."""
    near = compared(results, run("fastapi", [measurement([194], 40)]), [measurement([100], 40)])

    assert not [goal for goal in goals(near) if "best peer" in goal.what]


def test_large_photographs_are_held_against_the_limits_large_ones(results: Results) -> None:
    (limit,) = (each for each in results.comparisons if isinstance(each.other, Limit))
    limit.other.measurements.append(measurement([100], 80, photograph="12 MP"))
    limit.trimrt.measurements.append(measurement([86], 100, photograph="12 MP"))

    found = {goal.what: goal for goal in goals(results) if goal.what.startswith("12 MP")}
    share = found["12 MP, 8 connections: throughput to the limit's"]
    assert (share.bar, share.measured) == ("at least 0.85", pytest.approx(0.86))
    p99 = found["12 MP, 8 connections: p99 to the limit's time for 8 images"]
    assert p99.measured == pytest.approx(100 / 80)
    assert len(found) == 2, "no peer had any"


def test_connections_that_leave_cores_idle_and_memory_of_more_slots_are_no_goals(results: Results) -> None:
    four_cores = results.model_copy(update={"machine": results.machine.model_copy(update={"cores": 4})})

    found = [goal.what for goal in goals(four_cores)]
    assert found == ["latency at 1 connection to decoding and inference alone"]


def test_without_the_limit_nothing_tells_what_is_possible(results: Results) -> None:
    peers = [comparison for comparison in results.comparisons if isinstance(comparison.other, Run)]
    without = results.model_copy(update={"comparisons": peers})

    assert [goal.what for goal in goals(without)] == ["megabytes after all loads"]
    assert "cost nothing" not in markdown(without)


def test_labels_after_scaled_decoding_are_a_goal_once_they_were_compared(results: Results) -> None:
    *_, last = goals(results.model_copy(update={"agreement": 0.98}))

    assert last.what == "share of labels that scaled decoding of 12 MP JPEGs leaves as they are"
    assert (last.bar, last.reached) == ("at least 0.99", False)


def test_what_the_server_itself_costs_is_told_without_a_goal(results: Results) -> None:
    both = results.model_copy(update={"server_cpu_ms": 0.4})

    assert "TrimRT itself takes 0.40 ms of processor time for a request" in markdown(both)
    assert goals(both) == goals(results)


def digits() -> Results:
    """The fast network: the limit, two peers, and TrimRT in other ways."""

    def at(throughput: float, p99: float, connections: int) -> Measurement:
        return measurement([throughput, throughput], p99, connections, DIGIT)

    def ours() -> Run:
        return run("trimrt", [at(1000, 0.8, 1), at(3000, 4, 8), at(3200, 12, 32)], loaded_mb=270)

    def beside(other: Run | Limit) -> Comparison:
        return Comparison(other=other, trimrt=ours())

    def way(name: str, throughput: float) -> Comparison:
        measurements = [at(throughput, 5, connections) for connections in (8, 32)]
        other = run("trimrt", measurements, start_seconds=0.9)
        return beside(other.model_copy(update={"title": WAYS[name].title}))

    limit = Limit(
        measurements=[at(4000, 0.2, 1), at(8000, 1, 8), at(8000, 1, 32)],
        settings={DIGIT: Settings(throughput=SETTING, latency=SETTING)},
    )
    peers = [
        beside(run("mosec", [at(1500, 10, 8), at(2500, 10, 32)])),
        beside(run("fastapi", [at(600, 40, 8), at(600, 80, 32)])),
        beside(run("litserve", [at(9000, 1, 8), at(9000, 1, 32)], "usual")),
    ]
    ways = [way("one-process", 1600), way("form", 2850), way("v2", 2400)]
    return Results(
        started_at=datetime.now(timezone.utc),
        machine=this_machine().model_copy(update={"cores": 2}),
        seconds=20,
        comparisons=[beside(limit), *peers, *ways],
    )


def test_goals_of_the_fast_network_are_of_the_server() -> None:
    assert [(goal.what, goal.bar, round(goal.measured, 3), goal.reached) for goal in goals(digits())] == [
        ("8 connections: throughput to the best peer's (Mosec)", "at least 1.4", 2.0, True),
        ("8 connections: p99 to its", "at most 0.7", 0.4, True),
        ("32 connections: throughput to the best peer's (Mosec)", "at least 1.6", 1.28, False),
        ("32 connections: p99 to its", "at most 0.7", 1.2, False),
        ("8 connections: throughput to one process's", "at least 1.6", 1.875, True),
        ("8 connections: throughput of TrimRT, multipart form to raw", "at least 0.95", 0.95, True),
        ("8 connections: throughput of TrimRT, /v2 with BYTES to raw", "at least 0.9", 0.8, False),
        ("32 connections: throughput to one process's", "at least 1.6", 2.0, True),
        ("32 connections: throughput of TrimRT, multipart form to raw", "at least 0.95", 0.891, False),
        ("32 connections: throughput of TrimRT, /v2 with BYTES to raw", "at least 0.9", 0.75, False),
        # 0.4 ms instead of 0.1
        ("1 connection: ms of p50 beside decoding and inference", "at most 0.35", 0.3, True),
        # 50 seconds for ten seconds' requests, of both
        ("32 connections: ms of processor time beside these", "at most 0.25", 0.937, False),
        ("megabytes after all loads, a process for each core", "at most 350", 270, True),
        ("seconds until the first answer, one process", "at most 1", 0.9, True),
    ]


def test_the_fast_networks_report_has_its_own_images_and_no_large_ones() -> None:
    text = markdown(digits())

    assert "for PNGs of handwritten digits (8x8 pixels) at so many connections" in text
    assert "12 MP" not in text
    speed, *_ = rows(text, "no server")
    assert speed[2:6] == ["4000", "8000", "8000", "0.10"]


def test_a_peer_is_swept_over_its_processes_and_trimrt_over_its_ways() -> None:
    def titles(*arguments: object) -> list[str]:
        return [contender.title for contender, _ in contenders(*arguments)]  # type: ignore[arg-type]

    assert titles("digits", ["mosec", "v2"], [], [1, 2]) == [
        "TrimRT, /v2 with BYTES",
        "mosec, 1 process",
        "mosec, 2 processes",
    ]
    assert titles("resnet18", ["mosec"], [], []) == ["mosec", "mosec"], "in both forms"
    assert set(titles("digits", [], [], [])) > {way.title for way in WAYS.values()}


def test_results_are_completed_by_those_of_an_earlier_run(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    resume(results, path)
    path.write_text(results.model_dump_json())
    again = run("mosec", [measurement([300], 1)], "usual")
    now = results.model_copy(
        update={"comparisons": [Comparison(other=again, trimrt=run("trimrt", [measurement([600], 1)]))]}
    )

    resume(now, path)

    assert sorted(other.name for other in now.others) == ["litserve", "mosec"]
    assert again in now.others
    assert now.limit == results.limit

    elsewhere = now.model_copy(update={"machine": now.machine.model_copy(update={"processor": "another"})})
    with pytest.raises(click.ClickException, match="measured on another machine"):
        resume(elsewhere, path)


def test_reports_name_the_processor_and_its_instruction_sets() -> None:
    machine = this_machine().model_copy(
        update={"processor": "AMD EPYC", "instruction_sets": ["avx2", "avx512_vnni"], "cores": 2}
    )

    assert str(machine).startswith("AMD EPYC (avx2, avx512_vnni), 2 cores, ")


@pytest.mark.parametrize(
    "file", sorted(RESULTS.glob("*/*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_kept_reports_are_what_their_json_gives(file: Path) -> None:
    assert file.with_suffix(".md").read_text(encoding="utf-8") == render(file)
