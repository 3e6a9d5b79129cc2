"""Engine packages found in a directory."""

from __future__ import annotations

from pathlib import Path

from models.files import restore_in
from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, read_manifest


def find_package_folders(directory: Path) -> list[Path]:
    """The folders in `directory` that hold an engine package."""
    if not directory.is_dir():
        return []
    restore_in(directory)
    # A leading dot is a package that the builder has not finished.
    return [
        folder
        for folder in sorted(directory.iterdir())
        if not folder.name.startswith(".") and (folder / MANIFEST_NAME).is_file()
    ]


def find_packages(directory: Path) -> dict[Path, Manifest | EngineError]:
    """The engine packages in `directory`: their manifests, or why one cannot be used."""
    packages: dict[Path, Manifest | EngineError] = {}
    for folder in find_package_folders(directory):
        try:
            packages[folder] = read_manifest(folder)
        except EngineError as error:
            packages[folder] = error
    return packages


def find_package(directory: Path, name: str) -> Path:
    """The folder of engine `name` in `directory`; of several versions, the newest.

    Raises:
        EngineError: there is none.
    """
    packages = find_packages(directory)
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
    there = f"it holds {', '.join(names)}" if names else "it holds none"
    raise EngineError(f"no engine {name!r} in {directory} ({there}); `trimrt build` makes one")
