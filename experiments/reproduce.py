"""`python -m experiments.reproduce`: train, prune, compile and measure the folds of a study.

Each fold is a process of its own (experiments.fold). Finished stages are kept in the runs' folder and
an interrupted one continues where it stopped, so the same command can be given again at any time.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from experiments.fold import RESULT, fold_folder
from experiments.results import FOLDER, Fold, Results, made_here
from experiments.study import STUDIES, Study
from models.cores import cores
from trimrt.options import COUNT, HELP
from trimrt.options import FOLDER as OUTPUT

_STAGE: Final = re.compile(r"\[\d+/\d+\] ")


def _folds(_context: click.Context, _parameter: click.Parameter, value: str) -> list[int] | None:
    if value == "all":
        return None
    try:
        return sorted({int(number) for number in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither `all` nor numbers such as 0 or 0,2") from None


@click.command(context_settings=HELP)
@click.argument("study", type=click.Choice(list(STUDIES)), default="digits")
@click.option("--folds", callback=_folds, default="0", help="Numbers, or `all`.")
@click.option(
    "--jobs",
    default=1,
    type=COUNT,
    help="Folds side by side, which share the cores. Two folds of one thread each take less time than one "
    "after the other on two threads; their weights differ in the last bits.",
)
@click.option("--runs", type=OUTPUT, default="runs", help="Checkpoints.")
@click.option(
    "--results",
    type=OUTPUT,
    default=FOLDER,
    show_default="experiments/results",
    help="Folder of the result file.",
)
@click.option("--name", help="The result file's, without `.json`; the study's if not given.")
def reproduce(
    study: str, folds: list[int] | None, jobs: int, runs: Path, results: Path, name: str | None
) -> None:
    """Run STUDY and write its result file, which `make tables` makes docs/results.md from."""
    plan, console = STUDIES[study], Console()
    numbers = list(range(plan.folds)) if folds is None else folds
    if not set(numbers) <= set(range(plan.folds)):
        raise click.UsageError(f"{study} has folds 0 to {plan.folds - 1}")
    threads = max((cores()) // jobs, 1)
    tasks = [(fold, seed) for seed in range(plan.seeds) for fold in numbers]
    if jobs == 1:
        failed = [
            task
            for task in tasks
            if subprocess.run(_command(study, *task, threads, runs), check=False).returncode
        ]
    else:
        failed = _side_by_side(study, plan, tasks, jobs, threads, runs, console)
    if failed:
        raise click.ClickException(f"not finished: {', '.join(f'fold {f} seed {s}' for f, s in failed)}")
    words = [
        "python -m experiments.reproduce",
        study,
        "--folds",
        "all" if folds is None else ",".join(map(str, folds)),
    ]
    words += [f"--jobs {jobs}"] if jobs > 1 else []
    words += [f"--runs {runs} --name {name}"] if name else []
    path = results / f"{name or study}.json"
    files = [fold_folder(runs, plan, *task) / f"{study}-{RESULT}" for task in tasks]
    found = [Fold.model_validate_json(file.read_text(encoding="utf-8")) for file in files]
    Results(study=study, folds=found, **made_here(" ".join(words))).write(path)
    console.print(f"{path} is written; `make tables` brings docs/results.md and the README up to date")


def _command(study: str, fold: int, seed: int, threads: int, runs: Path) -> list[str]:
    arguments = f"{study} {fold} --seed {seed} --threads {threads} --runs {shlex.quote(str(runs))}"
    return [sys.executable, "-u", "-m", "experiments.fold", *shlex.split(arguments)]


def _side_by_side(
    study: str,
    plan: Study,
    tasks: list[tuple[int, int]],
    jobs: int,
    threads: int,
    runs: Path,
    console: Console,
) -> list[tuple[int, int]]:
    """Run the folds, `jobs` at a time, with what they say in a log beside each; those that failed."""

    def run(task: tuple[int, int]) -> bool:
        base = fold_folder(runs, plan, *task)
        base.mkdir(parents=True, exist_ok=True)
        log = base / f"{study}.log"
        command = _command(study, *task, threads, runs)
        with (
            log.open("w", encoding="utf-8") as file,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                file.write(line)
                file.flush()
                if _STAGE.match(line):
                    console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
        if child.returncode:
            console.print(f"{base.name} failed; see {log}", style="red")
        return child.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        try:
            succeeded = list(pool.map(run, tasks))
        except KeyboardInterrupt:  # the folds that run get it too
            pool.shutdown(cancel_futures=True)
            raise click.ClickException("interrupted; the same command continues from here") from None
    return [task for task, success in zip(tasks, succeeded, strict=True) if not success]


if __name__ == "__main__":
    reproduce()
