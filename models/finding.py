"""Checkpoints by their names: those in the folder of runs, and those that ship with TrimRT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from models.card import CARD_NAME, CheckpointError, read_card
from models.naming import did_you_mean
from models.pretrained import DIGITS_STUDENT

RUNS: Final = Path("runs")
LAST_FIRST: Final = ("pruned", "student", "teacher")  # the stages of a run, each a checkpoint
_POINT: Final = "front-"  # of a run's folder, a network on the way to the pruned one


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint that a run of `trimrt compress` got to; None where `run` is no folder of a run."""
    return next((run / stage for stage in LAST_FIRST if (run / stage / CARD_NAME).is_file()), None)


def point_name(number: int) -> str:
    """Folder, within a run's, of a network on the way to the pruned one."""
    return f"{_POINT}{number}"


def points_of(run: Path) -> list[Path]:
    """The networks on the way to a run's pruned one, the costliest first."""
    found = (folder for folder in run.glob(f"{_POINT}*") if folder.name.removeprefix(_POINT).isdecimal())
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(_POINT)))


def find_checkpoint(name: str, runs: Path = RUNS) -> Path:
    """The folder of the checkpoint of that name, or the last one of the run of that name.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    if last := last_checkpoint(runs / name):
        return last
    named = list(_named(runs))
    found = [folder for folder, known in named if known == name]
    if len(found) > 1:
        raise CheckpointError(f"several checkpoints are called {name}; choose: {', '.join(map(str, found))}")
    if found:
        return found[0]
    if name == DIGITS_STUDENT.name:
        return DIGITS_STUDENT
    known = [DIGITS_STUDENT.name, *(known for _, known in named), *(path.name for path in _runs(runs))]
    raise CheckpointError(f"no checkpoint {name!r} in {runs}{did_you_mean(name, known)}")


def _runs(runs: Path) -> list[Path]:
    try:
        return sorted(path for path in runs.iterdir() if last_checkpoint(path))
    except OSError:
        return []


def _named(runs: Path) -> Iterator[tuple[Path, str]]:
    """Checkpoints in the runs, and the names in their cards."""
    for run in _runs(runs):
        for folder in (*(run / stage for stage in LAST_FIRST), *points_of(run)):
            try:
                yield folder, read_card(folder).name
            except CheckpointError:
                continue
