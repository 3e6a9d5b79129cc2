"""No process of a contender survives its measurement; all are counted, and all stop for another's turn."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
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

# Starts one short-lived process after the other.
BREEDING = """
import subprocess, sys
while True:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
"""

POLITE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("goodbye", flush=True), sys.exit()))
print("ready", flush=True)
while True:
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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


def test_a_paused_tree_computes_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(command("stay"), os.environ, log) as tree:
        members = wait_until(tree, log, members=2)
        tree.pause()

        wait_for(lambda: all(member.status() == psutil.STATUS_STOPPED for member in members))
        before = tree.cpu_seconds()
        time.sleep(0.3)
        assert tree.cpu_seconds() == before
        assert tree.memory_bytes() > 50_000_000

        tree.resume()
        wait_for(lambda: tree.cpu_seconds() > before)


def test_a_tree_that_grows_is_paused_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running([sys.executable, "-c", BREEDING], os.environ, log) as tree:
        wait_for(lambda: len(tree.members()) > 1)
        tree.pause()

        # One that has ended waits for its parent; one that was starting another (vfork) waits for that.
        still = {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DISK_SLEEP}
        wait_for(lambda: {member.status() for member in tree.members()} <= still)
        members = {member.pid for member in tree.members()}
        time.sleep(0.3)
        assert {member.pid for member in tree.members()} == members


@pytest.mark.parametrize("arguments", [["stay"], []], ids=["parent stays", "parent leaves"])
def test_a_paused_tree_is_ended_too(tmp_path: Path, arguments: list[str]) -> None:
    log = tmp_path / "log"
    with running(command(*arguments), os.environ, log) as tree:
        members = wait_until(tree, log, members=1 + len(arguments))
        tree.pause()

    assert not any(member.is_running() for member in members)


def test_a_paused_process_may_end_by_itself(tmp_path: Path) -> None:
    """It is told to, and is not killed before it could."""
    log = tmp_path / "log"
    with running([sys.executable, "-c", POLITE], os.environ, log) as tree:
        wait_for(lambda: b"ready" in log.read_bytes())
        tree.pause()

    assert b"goodbye" in log.read_bytes()


@pytest.mark.parametrize("arguments", [["stay"], []], ids=["parent stays", "parent leaves"])
def test_trees_side_by_side_are_not_mixed_up(tmp_path: Path, arguments: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with running(command("stay"), os.environ, one) as first:
        ours = wait_until(first, one, members=2)
        with running(command(*arguments), os.environ, two) as second:
            theirs = wait_until(second, two, members=1 + len(arguments))
            assert set(first.members()) == set(ours)
            assert not set(ours) & set(theirs)
            first.pause()
            wait_for(lambda: all(member.status() == psutil.STATUS_STOPPED for member in ours))
            assert not any(member.status() == psutil.STATUS_STOPPED for member in theirs)
        assert not any(member.is_running() for member in theirs)
        assert all(member.is_running() for member in ours)
