"""Folders that look like engine packages and are none, each as something that happens in a directory."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from runtime.manifest import MANIFEST_NAME

_LIBC: Final = ctypes.CDLL(None)
_PR_CAPBSET_DROP: Final = 24
_CAP_DAC_OVERRIDE: Final = 1
_CAP_DAC_READ_SEARCH: Final = 2


def obey_permissions() -> None:
    """Let root, too, read only what it may: for `preexec_fn`, since it cannot be taken back."""
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def with_manifest(content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / MANIFEST_NAME).write_bytes(content)

    return spoil


def with_member(name: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {name: value}))

    return spoil


def with_folder_as_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()


def with_pipe_as_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    os.mkfifo(folder / MANIFEST_NAME)


def with_link_as_manifest(target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / MANIFEST_NAME).unlink()
        (folder / MANIFEST_NAME).symlink_to(target)

    return spoil


def as_link_to_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def with_sparse_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST_NAME, 1 << 40)


def unreadable(folder: Path) -> None:
    folder.chmod(0)


def with_unreadable_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).chmod(0)


# What becomes of a package, and what is said of it.
SPOILED: Final[dict[str, tuple[Callable[[Path], None], str]]] = {
    "empty manifest": (with_manifest(b""), "not a valid engine manifest"),
    "no UTF-8": (with_manifest(b'{"name": "\xff\xfe"}'), "not a valid engine manifest"),
    "deep": (with_manifest(b"[" * 1_000_000), "not a valid engine manifest"),
    "half": (with_manifest(b'{"format": 1, "name": "ti'), "not a valid engine manifest"),
    "long version": (with_member("version", "9" * 5000), "version: .*at most 18"),
    "long number": (with_manifest(b'{"format": ' + b"9" * 5000 + b"}"), "not a valid engine manifest"),
    "mistakes": (with_member("labels", [1] * 10), "labels.0: .*labels.2: .*and 7 more$"),
    "endless mistakes": (with_member("labels", [1] * 100_000), "it has 100000 mistakes"),
    "huge": (with_sparse_manifest, "larger than 4,194,304 bytes"),
    "folder": (with_folder_as_manifest, "not a regular file"),
    "pipe": (with_pipe_as_manifest, "not a regular file"),
    "device": (with_link_as_manifest("/dev/zero"), "not a regular file"),
    "dangling link": (with_link_as_manifest("/nowhere"), "has no manifest.json"),
    "link to itself": (with_link_as_manifest(MANIFEST_NAME), "Too many levels of symbolic links"),
    "folder that is a link to itself": (as_link_to_itself, "Too many levels of symbolic links"),
}

# These only for those who are not root, or obey.
UNREADABLE: Final[dict[str, tuple[Callable[[Path], None], str]]] = {
    "lost+found": (unreadable, "Permission denied"),
    "unreadable manifest": (with_unreadable_manifest, "Permission denied"),
}


def spoil_all(package: Path, directory: Path, kinds: dict[str, tuple[Callable[[Path], None], str]]) -> None:
    """A copy of `package` for each of `kinds`, in a folder of its name."""
    for name, (spoil, _) in kinds.items():
        spoil(Path(shutil.copytree(package, directory / name)))
