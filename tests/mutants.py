"""`make mutants`: small breakages of the code that decides, one by one; each has to fail a test.

cosmic-ray makes them. Each is tried in a child of this process, which loads the broken code in the file's
place; the working tree stays as it is. If one passes all tests of its file, its diff is printed and the exit
code is 1.

The verdict does not depend on what else the machine does. An endless loop is found by its processor time, a
deadlock by the turns that this process had meanwhile. A test that fails while the machine stood still proves
nothing: the breakage is tried again.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.machinery import SourceFileLoader
from itertools import count
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import hypothesis
import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT: Final = Path(__file__).parents[1]
BUILD: Final = ROOT / "build" / "mutants"
SIDE_BY_SIDE: Final = 2
TURN_S: Final = 0.05
STOOD_STILL_S: Final = 1.0  # a turn that comes so late: some tests wait for no longer
TRIES: Final = 5
VERDICTS: Final = ("noticed", "endless", "survived", "undecided")
# What a file's tests may take; and those of a breakage, more than without it.
MOST_PROCESSOR_S: Final = 600
MOST_TURNS: Final = 36_000
SLOWER: Final = 3
MORE_PROCESSOR_S: Final = 30
MORE_TURNS: Final = 1200

# Each file with the tests that are to notice; only quick ones, because every breakage runs them.
TARGETS: Final = {
    "server/admission.py": ["tests/server/test_admission.py"],
    "server/scheduler.py": [
        *("tests/server/test_scheduler.py", "tests/server/test_scheduling.py"),
        "tests/server/test_brief_engines.py",
    ],
    "server/backlog.py": ["tests/server/test_backlog.py"],
    "server/workers.py": ["tests/server/test_workers.py"],
    "server/decoding_limits.py": ["tests/server/test_decoding_limits.py"],
    "server/auth.py": ["tests/server/test_auth.py"],
    "runtime/batching.py": ["tests/runtime/test_batching.py"],
    "runtime/health.py": ["tests/runtime/test_health.py"],
    "builder/compile/verification.py": ["tests/builder/compile/test_verification.py"],
}
# Not all of cosmic-ray's: one for each way of being wrong is enough, and annotations are no arithmetic.
OPERATORS: Final = (
    *("AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop", "ExceptionReplacer"),
    *("NumberReplacer", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_USub_UAdd"),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("FloorDiv_Mul", "Mod_Mul")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
)
ONE_OF_MANY: Final = 0.01
_NUMBER: Final = re.compile(r"\d[\d_]*(?:\.\d+)?(?:e-?\d+)?")
# Lines that breakages leave behind and that change nothing, with the reason.
HARMLESS: Final[Mapping[str, Mapping[str, str]]] = {
    "server/admission.py": {
        "if asked is not None and asked <= seconds:": "the same seconds",
        "expired = time.monotonic() > self._deadline": "never equal",
        "if len(images) * self._top >= _MOST_RANKED:": "one class less",
        "if pieces > _MOST_PIECES and self._size < pieces * _LEAST_PIECE:": "one piece more",
        "if pieces >= _MOST_PIECES and self._size <= pieces * _LEAST_PIECE:": "one byte less",
        "return 1": "no limit is so small",
        "return -1": "the same",
    },
    "runtime/batching.py": {
        "share = max(1, max(pending, *self._loads, 1) // self._slots)": "what is pending is never below 0",
        "share = max(1, max(pending, *self._loads, -1) // self._slots)": "the same",
        "delay: float = -1.0,": "no delay either",
        "return now <= min(self._came_at) + _MIXED_S": "never equal",
    },
    "builder/compile/verification.py": {
        "@dataclass(frozen=False)": "nothing writes to it",
        "if comparison.drop is not None and not comparison.drop < self.max_drop + 1e-9:": "never equal",
        "if not comparison.label_agreement > self.min_agreement - 1e-9:": "the same",
    },
}
# What takes long to import and is not TrimRT's, so that children need not.
PRELOADED: Final = (
    *("anyio", "fastapi", "grpc.aio", "httptools", "httpx", "numpy", "openvino", "orjson"),
    *("pillow_heif", "PIL.Image", "pydantic_settings", "pytest_cov.plugin", "rich.console", "schemathesis"),
    *("uvicorn", "xdist.plugin"),
)


def breakages(code: str) -> Iterator[str]:
    """`code`, broken in one place at a time."""
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        for occurrence in count():
            broken = mutate_code(code, operator, occurrence)
            if broken is None:
                break
            yield broken


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
        diff: from the code as it is; empty if it is not broken.
        turns: how often this process looked at it.
        stood_still: the machine let neither of them run for a while.
        passed: the tests that it passed.
        noticed_by: the test that failed.
        tries: of that test.
    """

    file: str
    code: str
    diff: str = ""
    processor_s: float = 0.0
    turns: int = 0
    stood_still: bool = False
    passed: set[str] = field(default_factory=set)
    noticed_by: str = ""
    tries: int = 0
    status: int = 0
    _pipe: int = field(default=-1, repr=False)

    def start(self, log: Path, most_processor_s: int, noticed: Counter[str]) -> int:
        """Run the tests of the file that it has not passed; the child's process id."""
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
        _load_instead(ROOT / self.file, self.code)
        options = ("-q", "--no-header", "--assert", "plain", "-p", "no:cacheprovider", "--timeout", "0")
        folder = ("--basetemp", str(log.with_suffix("")))
        try:
            status = pytest.main([*options, *folder, *TARGETS[self.file]], plugins=[watch])
        finally:
            os._exit(status)

    def end(self, status: int, used: resource.struct_rusage) -> None:
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


def tried(trials: list[Trial], most_processor_s: int, most_turns: int) -> Iterator[Trial]:
    """The trials as they come to an end, which they do within the limits."""
    waiting, running, noticed = deque(trials), dict[int, Trial](), Counter[str]()
    logs = [BUILD / f"{number}.log" for number in range(SIDE_BY_SIDE)]
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


def _diff(file: str, code: str, broken: str) -> str:
    lines = difflib.unified_diff(code.splitlines(), broken.splitlines(), file, file, lineterm="")
    return "\n".join(lines)


def _is_harmless(trial: Trial) -> bool:
    """Whether it leaves a known line, lets an argument be given by place, or has one more or less of many."""
    removed, added = (_line(trial.diff, sign) for sign in "-+")
    before, after = ([float(number) for number in _NUMBER.findall(line)] for line in (removed, added))
    return (
        added in HARMLESS.get(trial.file, ())
        or added.replace("/,", "*,") == removed
        or (before != after and all(map(partial(math.isclose, rel_tol=ONE_OF_MANY), before, after)))
    )


def _line(diff: str, sign: str) -> str:
    return next(line[1:].strip() for line in diff.splitlines()[2:] if line.startswith(sign))


def _try(file: str) -> bool:
    """Break `file` everywhere, and say what became of it; whether all is well."""
    code = (ROOT / file).read_text(encoding="utf-8")
    (whole,) = tried([Trial(file, code)], MOST_PROCESSOR_S, MOST_TURNS)
    if whole.verdict != "survived":
        raise click.ClickException(f"{file}: tests fail without a breakage: {whole.noticed_by}")
    trials = [Trial(file, broken, _diff(file, code, broken)) for broken in breakages(code)]
    trials = [trial for trial in trials if not _is_harmless(trial)]
    verdicts = Counter[str]()
    processor_s = 0.0
    limits = int(SLOWER * whole.processor_s) + MORE_PROCESSOR_S, SLOWER * whole.turns + MORE_TURNS
    for trial in tried(trials, *limits):
        verdicts[trial.verdict] += 1
        processor_s += trial.processor_s
        if trial.verdict in ("survived", "undecided"):
            click.echo(f"\n{trial.verdict}:\n{trial.diff}\n")
    found = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS)
    click.echo(f"{file}: {len(trials)} breakages: {found}; {processor_s:.0f} s of processor time")
    return not verdicts["survived"] + verdicts["undecided"]


@click.command()
@click.argument("files", nargs=-1, type=click.Choice(list(TARGETS)))
def main(files: tuple[str, ...]) -> None:
    """Break FILES (all, if none is named), and show which breakages no test noticed."""
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    for name in PRELOADED:
        import_module(name)
    # Neither chance nor a busy machine decides.
    hypothesis.settings.register_profile(
        "mutants", deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.settings.load_profile("mutants")
    passed = [_try(file) for file in files or TARGETS]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
