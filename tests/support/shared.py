"""What is built once for all of pytest-xdist's workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder of that name, not to be changed.

    Args:
        factory: tells where the run's temporary files are.
        name: of the folder, the same for all workers.
        build: fills a new folder, in whichever worker comes first; the others wait.
    """
    run = factory.getbasetemp()
    shared = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "shared"
    shared.mkdir(exist_ok=True)
    folder, finished = shared / name, shared / f"{name}.finished"
    with FileLock(shared / f"{name}.lock"):
        if not finished.exists():
            folder.mkdir()
            build(folder)
            finished.touch()
    return folder
