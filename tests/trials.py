"""Tests against code that is broken on purpose, each in a child of this process.

The verdict does not depend on what else the machine does. An endless loop is found by its processor time, a
deadlock by the turns that this process had meanwhile. A test that fails while the machine stood still proves
nothing and is tried again.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest

SIDE_BY_SIDE: Final = 2
TURN_S: Final = 0.05
STOOD_STILL_S: Final = 1.0  # a turn that comes so late: some tests wait for no longer
TRIES: Final = 5
VERDICTS: Final = ("noticed", "endless", "survived", "undecided")


class _Watch:
    """A plugin of pytest: tells the parent which tests pass, and ends the process at the first that fails."""

    def __init__(self, to: int, passed: Container[str], noticed: Counter[str]) -> None:
        self._to = to
        self._passed = passed
        self._noticed = noticed

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what has passed; what has noticed most breakages comes first."""
        items[:] = [item for item in items if item.nodeid not in self._passed]
        items.sort(key=lambda item: -self._noticed[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._end(report.nodeid, report.longreprtext)
        if report.when == "teardown":
            os.write(self._to, f"{report.nodeid}\n".encode())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._end("nothing can be collected", report.longreprtext)

    def _end(self, name: str, reason: str) -> NoReturn:
        print(reason, flush=True)
        os.write(self._to, name.encode())
        os._exit(pytest.ExitCode.TESTS_FAILED)


@dataclass
class Trial:
    """One breakage under test, in a process of its own.

    Attributes:
        file: to be broken.
        code: what is loaded in its place.
        tests: those that are to notice.
        processor_s: what they took.
        turns: how often this process looked at it.
        stood_still: the machine let neither of them run for a while.
        passed: the tests that it passed.
        noticed_by: the test that failed.
        tries: of that test.
    """

    file: Path
    code: str
    tests: Sequence[str]
    processor_s: float = 0.0
    turns: int = 0
    stood_still: bool = False
    passed: set[str] = field(default_factory=set)
    noticed_by: str = ""
    tries: int = 0
    status: int = 0
    _pipe: int = field(default=-1, repr=False)

    def start(self, log: Path, most_processor_s: int, noticed: Counter[str]) -> int:
        """Run the tests that it has not passed; the child's process id."""
        self.turns, self.stood_still = 0, False
        self._pipe, to = os.pipe()
        process = os.fork()
        if process == 0:
            self._run(log, most_processor_s, _Watch(to, self.passed, noticed))
        os.close(to)
        return process

    def _run(self, log: Path, most_processor_s: int, watch: _Watch) -> NoReturn:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (most_processor_s, most_processor_s + 5))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _load_instead(self.file, self.code)
        options = ("-q", "--no-header", "--assert", "plain", "-p", "no:cacheprovider", "--timeout", "0")
        folder = ("--basetemp", str(log.with_suffix("")))
        status: int = pytest.ExitCode.INTERNAL_ERROR
        try:
            status = pytest.main([*options, *folder, *self.tests], plugins=[watch])
        finally:
            os._exit(status)

    def end(self, status: int, used: resource.struct_rusage) -> None:
        """Take in how the child ended, and what it used."""
        self.status = status
        self.processor_s += used.ru_utime + used.ru_stime
        before = self.noticed_by
        with os.fdopen(self._pipe) as pipe:
            *passed, self.noticed_by = pipe.read().split("\n")
        self.passed.update(passed)
        self.tries = self.tries + 1 if self.noticed_by == before else 1

    @property
    def verdict(self) -> str:
        """What became of it."""
        if self.status == 0:
            return "survived"
        if os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) in (signal.SIGXCPU, signal.SIGKILL):
            return "endless"
        return "undecided" if self.stood_still and self.noticed_by else "noticed"


def _load_instead(path: Path, code: str) -> None:
    """Whoever imports `path` from now on gets `code`."""
    load = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> Any:
        if Path(loader.path) == path:
            return compile(code, path, "exec", dont_inherit=True)
        return load(loader, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def tried(
    trials: Iterable[Trial], folder: Path, most_processor_s: int = 600, most_turns: int = 36_000
) -> Iterator[Trial]:
    """The trials as they come to an end, which they do within the limits; `folder` is for what they write."""
    waiting, running, noticed = deque(trials), dict[int, Trial](), Counter[str]()
    logs = [folder / f"{number}.log" for number in range(SIDE_BY_SIDE)]
    used: dict[int, Path] = {}
    while waiting or running:
        while waiting and logs:
            trial, log = waiting.popleft(), logs.pop()
            process = trial.start(log, most_processor_s, noticed)
            running[process], used[process] = trial, log
        began = time.monotonic()
        time.sleep(TURN_S)
        stood_still = time.monotonic() - began > STOOD_STILL_S
        for process, trial in list(running.items()):
            trial.turns += 1
            trial.stood_still |= stood_still
            ended, status, usage = os.wait4(process, os.WNOHANG)
            if not ended:
                if trial.turns >= most_turns:
                    os.killpg(process, signal.SIGKILL)
                continue
            del running[process]
            logs.append(used.pop(process))
            trial.end(status, usage)
            noticed[trial.noticed_by] += 1
            if trial.verdict == "undecided" and trial.tries < TRIES:
                waiting.appendleft(trial)
            else:
                yield trial
