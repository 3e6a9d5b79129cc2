"""What is written about an engine package when it is published."""

from __future__ import annotations

from pathlib import Path

from models.errors import TrimRTError
from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, read_manifest


class PublicationError(TrimRTError):
    """A package that cannot be put where it was meant to go; the message says what to do."""


def next_version(destination: Path) -> str:
    """The version of a package that replaces what is at `destination`.

    Raises:
        PublicationError: what is there is no engine package.
    """
    if not destination.exists():
        return "1"
    try:
        return str(int(read_manifest(destination).version) + 1)
    except EngineError as error:
        raise PublicationError(
            f"{error}. Move {destination} out of the way, or choose another --output"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into a package's folder."""
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
