"""What is written about an engine package when it is published."""

from __future__ import annotations

from pathlib import Path

from builder.kit import Student
from models.errors import TrimRTError
from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, read_manifest


class PublicationError(TrimRTError):
    """A package that cannot be put where it was meant to go; the message says what to do."""


def next_version(destination: Path, student: Student | None = None) -> str:
    """The version of a package that replaces what is at `destination`.

    Args:
        destination: the package's folder.
        student: the network that the package is made of; None: it may replace one of any network.

    Raises:
        PublicationError: what is there is no engine package, or one of another network.
    """
    if not destination.exists():
        return "1"
    try:
        there = read_manifest(destination)
    except EngineError as error:
        raise PublicationError(
            f"{error}. Move {destination} out of the way, or choose another --output"
        ) from error
    if student is not None and (difference := _difference(there, student)):
        raise PublicationError(
            f"{destination} is of another network: {difference}. Name this one with --name, or pass --replace"
        )
    return str(int(there.version) + 1)


def _difference(there: Manifest, student: Student) -> str | None:
    """How a package's network differs from `student`; None: they have the same labels and origin."""
    if there.labels != student.labels:
        return "its labels differ"
    origin = there.provenance
    if origin.source is None or student.source is None or origin.source == student.source:
        return None  # packages of earlier versions do not say where they came from
    if origin.checkpoint_sha256 is not None and origin.checkpoint_sha256 == student.checkpoint_sha256:
        return None
    return f"it was made of {origin.source}, this one is {student.source}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into a package's folder."""
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
