"""Writing files and folders so that neither a reader nor an interrupted writer is left with half of one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sibling(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed to `path` on success and removed on failure."""
    new = _sibling(path)
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a new empty sibling of `folder` that takes its place on success and is removed on failure."""
    new, old = _sibling(folder), _sibling(folder)
    new.mkdir()
    try:
        yield new
        # A folder cannot be renamed onto a full one, so the old one steps aside first.
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
