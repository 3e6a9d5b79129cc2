"""`make mutants`: small breakages of the code that decides, one by one; each has to fail a test.

cosmic-ray makes them, in copies of the working tree under `build/mutants`. If one passes all tests of its
file, its diff is printed and the exit code is 1.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import click

ROOT: Final = Path(__file__).parents[1]
BUILD: Final = ROOT / "build" / "mutants"
PROGRAMS: Final = Path(sys.executable).parent
SIDE_BY_SIDE: Final = 2

# Each file with the tests that are to notice; only quick ones, because every breakage runs them.
TARGETS: Final = {
    "server/admission.py": ["tests/server/test_admission.py"],
    "server/scheduler.py": ["tests/server/test_scheduler.py", "tests/server/test_scheduling.py"],
    "runtime/batching.py": ["tests/runtime/test_batching.py"],
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
# Lines that breakages leave behind and that change nothing, with the reason.
HARMLESS: Final = {
    "share = max(1, max(pending, *self._loads, 1) // self._slots)": "what is pending is never below 0",
    "share = max(1, max(pending, *self._loads, -1) // self._slots)": "the same",
    "@dataclass(frozen=False)": "nothing writes to it",
    "if asked is not None and asked <= seconds:": "the same seconds",
    "expired = time.monotonic() > self._deadline": "never equal",
    "if len(images) * self._top >= _MOST_RANKED:": "one class less",
    "if self._pieces >= _MOST_PIECES and self._size < self._pieces * _LEAST_PIECE:": "one piece less",
    "if not drop < self.max_drop + 1e-9:  # the shares are rounded quotients; NaN fails too": "never equal",
    "if not comparison.label_agreement > self.min_agreement - 1e-9:": "the same",
    "waiting: deque[ImageT], now: float, max_size: int, delay: float = -1.0": "no delay either",
}
CONFIG: Final = """\
[cosmic-ray]
module-path = "{file}"
timeout = 90.0
test-command = "{python} -m pytest -q -x --no-header -p no:cacheprovider --timeout 60 {tests}"
distributor.name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/(?!({operators})$)"]
"""


def survivors(file: str) -> tuple[int, list[str]]:
    """How many breakages of `file` there were, and the diffs of those that passed all tests."""
    folder = BUILD / file.replace("/", "-").removesuffix(".py")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT)
    subprocess.run(["xargs", "-0", "cp", "--parents", "-t", folder], input=tracked, cwd=ROOT, check=True)
    config = CONFIG.format(
        file=file, python=sys.executable, tests=" ".join(TARGETS[file]), operators="|".join(OPERATORS)
    )
    (folder / "mutants.toml").write_text(config, encoding="utf-8")

    def run(program: str, *arguments: str) -> str:
        command = [PROGRAMS / program, *arguments]
        return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

    run("cosmic-ray", "baseline", "mutants.toml")
    run("cosmic-ray", "init", "mutants.toml", "mutants.sqlite")
    run("cr-filter-operators", "mutants.sqlite", "mutants.toml")
    run("cosmic-ray", "exec", "mutants.toml", "mutants.sqlite")
    results = [json.loads(line)[1] for line in run("cosmic-ray", "dump", "mutants.sqlite").splitlines()]
    tried = [result for result in results if result["worker_outcome"] != "skipped"]
    passed = [result["diff"] for result in tried if result["test_outcome"] == "survived"]
    return len(tried), [diff for diff in passed if not _is_harmless(diff)]


def _is_harmless(diff: str) -> bool:
    """Whether it leaves nothing but known lines, or lets arguments be given by place that nobody gives so."""
    return _added_lines(diff) <= set(HARMLESS) or _added_lines(diff.replace("/,", "*,")) <= _removed_lines(
        diff
    )


def _added_lines(diff: str) -> set[str]:
    return {line[1:].strip() for line in diff.splitlines() if line.startswith("+") and line[:3] != "+++"}


def _removed_lines(diff: str) -> set[str]:
    return {line[1:].strip() for line in diff.splitlines() if line.startswith("-") and line[:3] != "---"}


@click.command()
@click.argument("files", nargs=-1, type=click.Choice(list(TARGETS)))
def main(files: tuple[str, ...]) -> None:
    """Break FILES (all, if none is named), and show which breakages no test noticed."""
    failed = False
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for file, (tried, survived) in zip(
            files or TARGETS, pool.map(survivors, files or TARGETS), strict=True
        ):
            click.echo(f"{file}: {tried} breakages, {len(survived)} passed the tests")
            for diff in survived:
                click.echo(f"\n{diff}")
            failed |= bool(survived)
    sys.exit(failed)


if __name__ == "__main__":
    main()
