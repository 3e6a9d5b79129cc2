"""Engine packages found in a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from models.files import restore, restore_in
from models.naming import MANY, did_you_mean, few, nothing_at
from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, read_manifest
from runtime.signatures import ANYONE, Trust

Stamp: TypeAlias = "tuple[tuple[str, int, int, int], ...] | str"
"""Each file's name, size, and times of change; or why there is none."""


def is_package(folder: Path) -> bool:
    """Whether `folder` holds an engine package, or what might be one but may not be looked into."""
    try:
        (folder / MANIFEST_NAME).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def find_package_folders(directory: Path) -> list[Path]:
    """The folders in `directory` that hold an engine package, or might: those that cannot be read.

    Raises:
        EngineError: `directory` itself cannot be read.
    """
    restore_in(directory)
    try:
        folders = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EngineError(f"{directory} cannot be read: {error.strerror}") from error
    # A leading dot is a package that the builder has not finished.
    return [folder for folder in folders if not folder.name.startswith(".") and is_package(folder)]


def find_packages(directory: Path, trust: Trust = ANYONE) -> dict[Path, Manifest | EngineError]:
    """The engine packages in `directory`: their manifests, or why one cannot be used.

    Args:
        directory: the engine directory.
        trust: whose packages can be used, here and in the functions below.

    Raises:
        EngineError: `directory` itself cannot be read.
    """
    packages: dict[Path, Manifest | EngineError] = {}
    for folder in find_package_folders(directory):
        try:
            packages[folder] = read_manifest(folder, trust)
        except EngineError as error:
            packages[folder] = error
    return packages


def find_package(directory: Path, name: str, trust: Trust = ANYONE) -> Path:
    """The folder of engine `name` in `directory`; of several versions, the newest.

    Raises:
        EngineError: there is none, or `directory` cannot be read.
    """
    packages = find_packages(directory, trust)
    found = {
        folder: int(manifest.version)
        for folder, manifest in packages.items()
        if isinstance(manifest, Manifest) and manifest.name == name
    }
    if found:
        return max(found, key=found.__getitem__)
    broken = packages.get(directory / name)
    if isinstance(broken, EngineError):
        raise broken
    names = sorted({manifest.name for manifest in packages.values() if isinstance(manifest, Manifest)})
    there = did_you_mean(name, names) or f" (it holds {few(names, MANY) or 'none'})"
    raise EngineError(f"no engine {name!r} in {directory}{there}; `trimrt build` makes one")


def resolve_package(engine: str | Path, directory: Path, trust: Trust = ANYONE) -> Path:
    """The folder of the package that a user names, by its path or by its name in `directory`.

    Raises:
        EngineError: there is none.
    """
    folder = Path(engine)
    restore(folder)
    if is_package(folder):
        return folder
    if folder.name == str(engine):
        try:
            return find_package(directory, folder.name, trust)
        except EngineError:
            if not folder.exists():
                raise
    elif not folder.exists():
        raise EngineError(nothing_at(folder))
    read_manifest(folder, trust)  # says what is missing
    return folder


def choose_packages(
    directory: Path, names: Sequence[str], *, trust: Trust = ANYONE, may_be_empty: bool = False
) -> list[Path]:
    """The package folders that `names` name: names in `directory`, or paths.

    Args:
        directory: the engine directory.
        names: none of them: the one package in `directory` that can be used.
        trust: whose packages can be used.
        may_be_empty: without names there may also be none.

    Raises:
        EngineError: one of them does not exist or has no valid manifest; or none is named, and `directory`
            holds several that can be used, or none.
    """
    if names:
        return [_named(directory, name, trust) for name in names]
    packages = find_packages(directory, trust)
    usable = [folder for folder, manifest in packages.items() if isinstance(manifest, Manifest)]
    if len(usable) == 1 or (not usable and may_be_empty):
        return usable
    if usable:
        raise EngineError(
            f"{directory} holds {len(usable)} engine packages; choose with --engine NAME: "
            + ", ".join(folder.name for folder in usable)
        )
    if packages:
        reasons = "; ".join(map(str, packages.values()))
        raise EngineError(f"no engine package in {directory} can be used: {reasons}")
    raise EngineError(f"no engine package in {directory}; `trimrt build` makes one")


def _named(directory: Path, name: str, trust: Trust) -> Path:
    folder = resolve_package(name, directory, trust)
    read_manifest(folder, trust)
    return folder


def survey(
    directory: Path, refusals: Mapping[Path, tuple[Stamp, str]], trust: Trust = ANYONE
) -> tuple[dict[str, Manifest], dict[Path, str]]:
    """The newest usable manifest of each name, and why other packages are refused.

    Args:
        directory: the engine directory.
        refusals: what came of attempts to load packages, which were as the stamps say.
        trust: whose packages are usable.
    """
    usable: dict[str, Manifest] = {}
    refused: dict[Path, str] = {}
    try:
        packages = find_packages(directory, trust)
    except EngineError as error:
        return usable, {directory: str(error)}
    for folder, manifest in packages.items():
        stamp, reason = refusals.get(folder, ("", ""))
        if isinstance(manifest, EngineError):
            refused[folder] = str(manifest)
        elif reason and stamp == stamp_of(folder):
            refused[folder] = reason
        elif manifest.name not in usable or int(usable[manifest.name].version) < int(manifest.version):
            usable[manifest.name] = manifest
    return usable, refused


def stamp_of(folder: Path) -> Stamp:
    """What changes whenever a file of the package does; equal stamps at two moments: it held still."""
    try:
        return tuple(
            (file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            for file in sorted(folder.iterdir())
            for status in (_status(file),)
        )
    except OSError as error:
        return str(error)


def _status(file: Path) -> os.stat_result:
    """Of what a link leads to, or of the link if it leads nowhere."""
    try:
        return file.stat()
    except OSError:
        return file.lstat()
