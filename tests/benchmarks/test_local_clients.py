"""What Unix socket and shared memory gain: the ways are asked in turns, and compared pair by pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_engine import write_package

from benchmarks.local_clients import (
    AGAINST,
    IN_MEMORY,
    IN_REQUEST,
    SOCKET,
    TCP,
    Results,
    Turn,
    main,
    markdown,
)
from benchmarks.measurements import this_machine


def turn(way: str, requests: int) -> Turn:
    return Turn(image="a", way=way, requests=requests, seconds=1, p10_ms=1, p50_ms=2, p99_ms=3, cpu_ms=0.5)


def test_the_ratio_is_that_of_turns_beside_each_other() -> None:
    results = Results(machine=this_machine(), engine="tiny", seconds=1)
    for over_tcp, over_socket in ((100, 110), (1000, 1300), (10, 12)):
        results.turns += [turn(TCP, over_tcp), turn(SOCKET, over_socket)]
        results.turns += [turn(IN_REQUEST, over_tcp), turn(IN_MEMORY, over_tcp // 2)]
    rows = [line for line in markdown(results).splitlines() if line.startswith("| a ")]
    assert [row.split("|")[-2].strip() for row in rows] == [
        "",
        "1.20 [1.10 to 1.30]",
        "",
        "0.50 [0.50 to 0.50]",
    ]
    assert [row.split("|")[3].strip() for row in rows] == ["100", "110", "100", "50"]


@pytest.mark.slow
def test_a_server_is_asked_in_every_way(tmp_path: Path) -> None:
    package = write_package(tmp_path / "engines")
    command = [str(package), "--seconds", "0.2", "--turns", "1", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    turns = json.loads((tmp_path / "out/local_clients.json").read_text())["turns"]
    assert len(turns) == 8
    assert {(it["image"].partition(",")[0], it["way"]) for it in turns} == {
        (image, way) for image in ("PNG", "JPEG") for way in AGAINST
    }
    assert all(it["requests"] > 0 for it in turns)
