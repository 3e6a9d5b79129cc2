"""Publishing an engine package: it appears whole, or not at all.

A package is made in `.NAME.partial` beside its destination and renamed into place. `.NAME.lock` is
locked meanwhile; such a lock ends with its process, however that ends, so whoever holds it may
remove what a killed build left behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, read_manifest

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class PublicationError(RuntimeError):
    """A package that cannot be put where it was meant to go; the message says what to do."""


class Staging:
    """A package being made.

    Attributes:
        folder: empty at first; what is in it becomes the package.
    """

    def __init__(self, destination: Path) -> None:
        self.folder = destination.with_name(f".{destination.name}.partial")
        self._destination = destination
        self._aside = destination.with_name(f".{destination.name}.old")

    def clear(self) -> None:
        """Start over with an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def publish(self, manifest: Manifest) -> Manifest:
        """Put the package at its destination, as the next version of what is there.

        Returns:
            The manifest as written, with its version.

        Raises:
            PublicationError: something else than an engine package is in the way.
        """
        manifest = manifest.model_copy(update={"version": _next_version(self._destination)})
        write_manifest(self.folder, manifest)
        for path in (*self.folder.iterdir(), self.folder):
            _sync(path)
        if not self._destination.exists():
            self.folder.rename(self._destination)
        elif not _exchange(self.folder, self._destination):
            self._destination.rename(self._aside)
            self.folder.rename(self._destination)
        _sync(self._destination.parent)
        return manifest

    def clean(self) -> None:
        """Remove what is not the published package: an unfinished one, or the one it replaced."""
        if self._aside.exists() and not self._destination.exists():
            self._aside.rename(self._destination)  # killed between the two renames
        for folder in (self.folder, self._aside):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staging(destination: Path) -> Iterator[Staging]:
    """A place to make the package that goes to `destination`; removed unless it is published.

    Raises:
        PublicationError: another process is building this package, or something else than an engine
            package is at the destination.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.with_name(f".{destination.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PublicationError(f"another process is building {destination}; wait for it to end") from None
        stage = Staging(destination)
        stage.clean()
        _next_version(destination)  # find out now, not after minutes of work
        try:
            stage.clear()
            yield stage
        finally:
            stage.clean()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into a package's folder."""
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _next_version(destination: Path) -> str:
    if not destination.exists():
        return "1"
    try:
        return str(int(read_manifest(destination).version) + 1)
    except EngineError as error:
        raise PublicationError(
            f"{error}. Move {destination} out of the way, or choose another --output"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two folders in one step, so that a reader always finds one; False where that is unsupported.

    Linux's renameat2(2), which Python does not wrap; some file systems lack it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, bytes(new), _AT_FDCWD, bytes(old), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS):
        return False
    raise PublicationError(f"cannot replace {old}: {os.strerror(error)}")
