"""`make mutants`: small breakages of the code that decides, one by one; each has to fail a test.

cosmic-ray makes them, `trials` tries them; the working tree stays as it is. If one passes all tests of its
file, its diff is printed and the exit code is 1.
"""

from __future__ import annotations

import difflib
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Final

import click
import hypothesis
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

from tests.trials import VERDICTS, Trial, tried

ROOT: Final = Path(__file__).parents[1]
BUILD: Final = ROOT / "build" / "mutants"
# What a breakage's tests may take, more than without it.
SLOWER: Final = 3
MORE_PROCESSOR_S: Final = 30
MORE_TURNS: Final = 1200

# Each file with the tests that are to notice; only quick ones, because every breakage runs them.
TARGETS: Final = {
    "server/admission.py": ["tests/server/test_admission.py"],
    "server/scheduler.py": [
        *("tests/server/test_scheduler.py", "tests/server/test_scheduling.py"),
        *("tests/server/test_brief_engines.py", "tests/runtime/test_priority.py::TestOfAServer"),
    ],
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
        "elif len(body) >= _SHORT_BODY:": "one byte less",
        "elif len(outcome) >= SMALL:": "an answer of four waits a turn, too",
        "return 1": "no limit is so small",
        "return -1": "the same",
    },
    "server/scheduler.py": {
        "one = images == 0  # the sum is the same then, but takes longer": "the sum is the same",
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
            if "not not " not in broken:  # as without any
                yield broken


def _diff(file: str, code: str, broken: str) -> str:
    lines = difflib.unified_diff(code.splitlines(), broken.splitlines(), file, file, lineterm="")
    return "\n".join(lines)


def _is_harmless(file: str, diff: str) -> bool:
    """Whether a breakage leaves a known line, lets an argument be given by place, or has one more of many."""
    removed, added = (_line(diff, sign) for sign in "-+")
    before, after = ([float(number) for number in _NUMBER.findall(line)] for line in (removed, added))
    return (
        added in HARMLESS.get(file, ())
        or added.replace("/,", "*,") == removed
        or (before != after and all(map(partial(math.isclose, rel_tol=ONE_OF_MANY), before, after)))
    )


def _line(diff: str, sign: str) -> str:
    return next(line[1:].strip() for line in diff.splitlines()[2:] if line.startswith(sign))


def _try(file: str) -> bool:
    """Break `file` everywhere, and say what became of it; whether all is well."""
    path, tests = ROOT / file, TARGETS[file]
    code = path.read_text(encoding="utf-8")
    (whole,) = tried([Trial(path, code, tests)], BUILD)
    if whole.verdict != "survived":
        raise click.ClickException(f"{file}: without a breakage, {whole.verdict}: {whole.noticed_by}")
    diffs = {broken: _diff(file, code, broken) for broken in breakages(code)}
    trials = [Trial(path, broken, tests) for broken, diff in diffs.items() if not _is_harmless(file, diff)]
    verdicts = Counter[str]()
    processor_s = whole.processor_s
    limits = int(SLOWER * whole.processor_s) + MORE_PROCESSOR_S, SLOWER * whole.turns + MORE_TURNS
    for trial in tried(trials, BUILD, *limits):
        verdicts[trial.verdict] += 1
        processor_s += trial.processor_s
        if trial.verdict in ("survived", "undecided"):
            click.echo(f"\n{trial.verdict}:\n{diffs[trial.code]}\n")
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
