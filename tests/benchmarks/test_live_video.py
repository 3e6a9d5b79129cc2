"""Live video in a browser: what is made of the frames' times, and that a real one is watched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_engine import write_package

from benchmarks.live_video import main, markdown, summed_up
from benchmarks.measurements import this_machine


def test_rate_latency_and_goals_follow_from_the_frames_times() -> None:
    answers = [(100 * number, 100 * number + 40, number % 2) for number in range(100)]
    results = summed_up(this_machine(), "tiny", 4, answers)
    assert (results.rate, results.p50_ms, results.p99_ms, results.dropped) == (25, 40, 40, 50)
    goals = [line for line in markdown(results).splitlines() if " at " in line]
    assert [line.split("|")[-3:-1] for line in goals] == [[" 25.00 ", " yes "], [" 1.20 ", " yes "]]


def test_a_stream_without_answers_reaches_no_goal() -> None:
    goals = [
        line for line in markdown(summed_up(this_machine(), "tiny", 4, [])).splitlines() if " at " in line
    ]
    assert [line.split("|")[-2] for line in goals] == [" no "] * 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_watches(tmp_path: Path) -> None:
    package = write_package(tmp_path / "engines")
    shot, output = tmp_path / "shot.png", tmp_path / "out"
    command = [str(package), "--seconds", "2", "--screenshot", str(shot), "--output", str(output)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    told = json.loads((output / "live_video.json").read_text())
    assert told["frames"] > 0
    assert 0 < told["p50_ms"] <= told["p99_ms"]
    assert shot.read_bytes().startswith(b"\x89PNG")
