"""Writers and readers of files and folders that are killed at every step, and what is found afterwards.

`python killed_writers.py ACTION FOLDER` prints what was found after each death as a JSON list. It is a
process of its own because each death takes a fork, which is slow where much is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from killing import killed_at_line

from models import files
from models.files import replace_file, replace_folder, restore

PARTS = ("a", "b/c")


def write_folder(folder: Path, content: str) -> None:
    with replace_folder(folder) as new:
        (new / "b").mkdir()
        for part in PARTS:
            (new / part).write_text(content)


def read_folder(folder: Path) -> str:
    """Its content, the same in all parts."""
    restore(folder)
    (content,) = {(folder / part).read_text() for part in PARTS}
    return content


def write_file(path: Path, content: str) -> None:
    with replace_file(path) as new:
        new.write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def deaths(action: Callable[[], object], at_least: int) -> Iterator[int]:
    """Kill `action` before each line that it executes of `models.files`, one after the other."""
    for number in range(1, 1000):
        if not killed_at_line(number, files.__file__, action):
            assert number > at_least
            return
        yield number
    raise AssertionError("it never ends")


def kill_folder_writers(parent: Path, *, exchange: bool) -> list[str]:
    """`exchange` tells whether the file system can exchange two folders."""
    folder = parent / "folder"
    if not exchange:
        files._exchange = lambda new, old: False
    write_folder(folder, "old")
    found = []
    for _ in deaths(lambda: write_folder(folder, "new"), at_least=20):
        assert folder.exists() or not exchange
        found.append(read_folder(folder))
        write_folder(folder, "old")
        assert read_folder(folder) == "old"
        assert names(parent) == ["folder"]
    return found


def kill_file_writers(parent: Path) -> list[str]:
    path = parent / "file"
    write_file(path, "old")
    found = []
    for _ in deaths(lambda: write_file(path, "new"), at_least=20):
        found.append(path.read_text())
        write_file(path, "old")
        assert path.read_text() == "old"
        assert names(parent) == ["file"]
    return found


def kill_readers(parent: Path) -> list[str]:
    """Those that restore a folder that a killed writer moved aside."""
    folder = parent / "folder"

    def move_aside() -> None:
        write_folder(folder, "old")
        folder.rename(parent / ".folder.old")

    move_aside()
    found = []
    for _ in deaths(lambda: restore(folder), at_least=10):
        found.append(read_folder(folder))
        move_aside()
    found.append(read_folder(folder))
    assert names(parent) == ["folder"]
    return found


ACTIONS: Final[dict[str, Callable[[Path], list[str]]]] = {
    "folder": partial(kill_folder_writers, exchange=True),
    "folder without exchange": partial(kill_folder_writers, exchange=False),
    "file": kill_file_writers,
    "reader": kill_readers,
}

if __name__ == "__main__":
    print(json.dumps(ACTIONS[sys.argv[1]](Path(sys.argv[2]))))
