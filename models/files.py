"""Atomic replacement of files and folders.

What is new is written to `.NAME.partial` beside its destination, flushed to the disk and renamed. A reader
finds the old or the new content, always whole, even after a crash of the writer or of the machine.

A folder cannot be renamed onto a full one, so Linux exchanges the two. Where that is not supported, the old
folder is `.NAME.old` for a moment. A crash in that moment leaves nothing at the destination; `restore`
puts the old folder back.

`.NAME.lock` keeps other writers out. The kernel releases the lock when its process ends, however that ends,
so whoever holds it may remove what a killed writer left behind.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from models.errors import TrimRTError

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class BusyError(TrimRTError):
    """Another process is writing the same folder."""


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the path to write to; the file there replaces `path` if the block succeeds.

    A second writer waits for the first.
    """
    with locked(path), _naming(path):
        partial = _beside(path, "partial")
        try:
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path, *, cache: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces `folder` if the block succeeds.

    Args:
        folder: made with its parents.
        cache: it can be made again, maybe of many small files: it is not flushed to the disk, and a second
            writer waits for the first.

    Raises:
        BusyError: another process is writing `folder`, which is no cache.
    """
    with locked(folder, wait=cache), _naming(folder):
        partial = _beside(folder, "partial")
        _clean(folder)
        try:
            partial.mkdir()
            yield partial
            if not cache:
                _sync_tree(partial)
            if not folder.exists():
                partial.rename(folder)
            elif not _exchange(partial, folder):
                folder.rename(_beside(folder, "old"))
                partial.rename(folder)
            _sync(folder.parent)
        finally:
            _clean(folder)


def require_writable(path: Path) -> None:
    """Find out before hours of work that a folder cannot be made or written; nothing is made.

    Raises:
        OSError: it names `path`.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), os.fspath(path))


def restore(folder: Path) -> None:
    """Put `folder` back if its writer was killed while it was moved aside; readers call this first."""
    with suppress(OSError):  # some readers may not write here, or not even look
        if not folder.exists() and _beside(folder, "old").exists():
            with locked(folder):
                _clean(folder)


def restore_in(parent: Path) -> None:
    """`restore` every folder in `parent`."""
    with suppress(OSError):
        for old in parent.glob(".*.old"):
            restore(parent / old.name[1 : -len(".old")])


def clear_folder(folder: Path) -> None:
    """Remove everything in `folder`."""
    for path in folder.iterdir():
        _remove(path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `path`, whose file is gone afterwards. It says nothing of what is at `path`.

    Raises:
        BusyError: another process holds it, and it is not to be waited for.
    """
    import fcntl  # not on Windows, where packages can be served but not written

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _beside(path, "lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lock):  # else the holder before has just removed it
                break
        except BlockingIOError:
            os.close(descriptor)
            raise BusyError(f"another process is writing {path}; wait for it to end") from None
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # child processes may hold the descriptor too
        os.close(descriptor)


def _beside(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}.{role}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors of a full disk say what was being written: those of `write` do not name the file."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _clean(folder: Path) -> None:
    """Remove what is beside `folder`; put it back if it was moved aside."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    _remove(_beside(folder, "partial"))
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two folders in one step; False where that is not supported.

    Linux's renameat2(2), which Python does not wrap; some file systems lack it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(error, os.strerror(error), str(old))
