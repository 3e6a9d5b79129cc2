"""No process of a contender survives its measurement, and all of them are counted."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import ProcessTree, running

# Starts a child in a session of its own, which ignores SIGTERM, computes, and outlives its parent.
DETACHING = """
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    block = b"x" * 50_000_000
    print("ready", flush=True)
    while True:
        pass
if "stay" in sys.argv:
    signal.pause()
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", DETACHING, *arguments]


def wait_until(tree: ProcessTree, log: Path, members: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = tree.members()
        if len(found) == members and b"ready" in log.read_bytes():
            return found
    raise AssertionError(f"{members} processes expected, there are {found}")


@pytest.mark.parametrize("arguments", [["stay"], []], ids=["parent stays", "parent leaves"])
def test_detached_processes_are_ended_too(tmp_path: Path, arguments: list[str]) -> None:
    log = tmp_path / "log"
    with running(command(*arguments), os.environ, log) as tree:
        members = wait_until(tree, log, members=1 + len(arguments))

    assert not any(member.is_running() for member in members)


def test_processes_are_ended_when_the_measurement_fails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    try:
        with running(command("stay"), os.environ, log) as tree:
            members = wait_until(tree, log, members=2)
            raise KeyError
    except KeyError:
        pass

    assert not any(member.is_running() for member in members)


def test_the_whole_tree_is_measured(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(command("stay"), os.environ, log) as tree:
        wait_until(tree, log, members=2)
        before, start = tree.cpu_seconds(), time.monotonic()
        while tree.cpu_seconds() < before + 0.2:  # the child computes, the parent sleeps
            assert time.monotonic() < start + 20

        assert tree.memory_bytes() > 50_000_000
