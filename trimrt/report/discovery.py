"""Finding checkpoints and engine packages under the folders that a user names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, get_args

from models.card import CARD_NAME, Card, CheckpointError, read_card
from models.errors import TrimRTError
from models.files import restore, restore_in
from models.finding import find_checkpoint
from models.naming import nothing_at
from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, Precision, read_manifest
from runtime.packages import find_package
from trimrt.report.results import LeftOut

_ROLES: Final = ("teacher", "student", "pruned")
_PRECISIONS: Final = get_args(Precision)


class ReportError(TrimRTError):
    """No report can be made; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with a valid card; its weights were not looked at."""

    folder: Path
    card: Card


@dataclass(frozen=True)
class EnginePackage:
    """An engine package with a valid manifest; its artefact was not looked at."""

    folder: Path
    manifest: Manifest


@dataclass
class Found:
    """What there is to report on, in the report's order.

    Attributes:
        checkpoints: teachers first, the larger first.
        packages: the larger first, then by precision.
        left_out: found too, but damaged or a copy of another.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    packages: list[EnginePackage] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def locate(name: str, engine_dir: Path) -> Path:
    """The folder that a user names: by its path, by an engine's name, or by a checkpoint's or a run's.

    Raises:
        ReportError: there is none.
    """
    path = Path(name)
    restore(path)
    if path.exists():
        return path
    if path.name != name:
        raise ReportError(nothing_at(path))
    try:
        return find_package(engine_dir, name)
    except EngineError as no_engine:
        try:
            return find_checkpoint(name)
        except CheckpointError as no_checkpoint:
            raise ReportError(f"{nothing_at(path)}; {no_engine}; {no_checkpoint}") from None


def discover(paths: Sequence[Path]) -> Found:
    """Checkpoints and engine packages at `paths` and in folders below them; hidden folders are skipped.

    Raises:
        ReportError: a given path is damaged or of no known kind, or none has anything in it.
    """
    found, seen = Found(), set[Path]()
    for path in paths:
        restore(path)
        if not path.is_dir():
            raise ReportError(
                f"{path} is not a folder; name checkpoints, engine packages, or folders of them"
            )
        for folder in _candidates(path):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                _add(folder, found)
            except (CheckpointError, EngineError) as error:
                if folder == path:
                    raise ReportError(str(error)) from error
                found.left_out.append(LeftOut(path=str(folder), reason=_first_lines(error)))
    if not found.checkpoints and not found.packages:
        faults = "".join(f"\n{item.path}: {item.reason}" for item in found.left_out)
        raise ReportError(
            f"no checkpoint ({CARD_NAME}) and no engine package ({MANIFEST_NAME}) in "
            f"{', '.join(map(str, paths))}; `trimrt compress` and `trimrt build` make them{faults}"
        )
    found.checkpoints.sort(key=_checkpoint_order)
    found.packages.sort(key=_package_order)
    return found


def _candidates(path: Path) -> Iterator[Path]:
    """Folders with a card or a manifest, in alphabetical order; nothing is looked for inside of them."""
    restore_in(path)
    for name, folders, files in os.walk(path):
        if CARD_NAME in files or MANIFEST_NAME in files:
            folders.clear()
            yield Path(name)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for folder in folders:
            restore_in(Path(name, folder))


def _add(folder: Path, found: Found) -> None:
    if (folder / CARD_NAME).is_file():
        card = read_card(folder)
        same = [other for other in found.checkpoints if card.weights_sha256 == other.card.weights_sha256]
        if same and card.weights_sha256:
            _leave_out_copy(folder, same[0].folder, found)
        else:
            found.checkpoints.append(Checkpoint(folder, card))
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        artefact = manifest.provenance.artefact_sha256
        copied = [other for other in found.packages if artefact == other.manifest.provenance.artefact_sha256]
        if copied:
            _leave_out_copy(folder, copied[0].folder, found)
        else:
            found.packages.append(EnginePackage(folder, manifest))


def _leave_out_copy(folder: Path, original: Path, found: Found) -> None:
    found.left_out.append(LeftOut(path=str(folder), reason=f"a copy of {original}: the same weights"))


def _first_lines(error: Exception) -> str:
    """A validation error has several lines for every field; the first says enough."""
    return " ".join(" ".join(str(error).splitlines()[:3]).split())


def _checkpoint_order(item: Checkpoint) -> tuple[int, int, str, str]:
    card = item.card
    return _ROLES.index(card.role), -card.metrics.parameters, card.name, str(item.folder)


def _package_order(item: EnginePackage) -> tuple[int, str, str, int, str]:
    manifest = item.manifest
    parameters, checkpoint = manifest.provenance.parameters, manifest.provenance.checkpoint_sha256
    precision = _PRECISIONS.index(manifest.precision)
    return -(parameters or 0), checkpoint or "", manifest.backend, precision, str(item.folder)
