"""A checkpoint, a kit or a package whose writer is killed at any moment is the old or the new one, whole."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from killing import kill_after, seconds_of

from builder.compile.publication import next_version, write_manifest
from builder.kit import Kit, open_kit
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import write_kit
from models import files
from models.card import CARD_NAME, read_card
from models.checkpoint import copy_checkpoint, load_checkpoint
from models.files import replace_folder
from runtime.manifest import Precision, read_artefact, read_manifest

MOMENTS = 200

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]


def kill_writers(folder: Path, write: Callable[[int], object], read: Callable[[], int]) -> None:
    """Kill writers of `folder` at many moments.

    Folders are exchanged in the first half of them, and moved aside in the second.

    Args:
        folder: what is replaced.
        write: replaces it by an edition. It starts no threads: the child that runs it is a fork.
        read: which edition is there.
    """
    draw = random.Random(0)
    write(0)
    edition, killed, replaced, longest = 0, 0, 0, seconds_of(partial(write, 0))
    with pytest.MonkeyPatch.context() as patch:
        for number in range(1, MOMENTS + 1):
            if number == MOMENTS // 2:
                patch.setattr(files, "_exchange", lambda new, old: False)
            early = kill_after(draw.uniform(0, longest), partial(write, number))
            longest *= 1.1 if early else 0.9  # however slow the disk is, half of them are killed
            killed += early
            found = read()
            assert found in (edition, number)
            replaced += found == number
            edition = found
            if number % 10 == 0:
                write(number)
                assert read() == number
                assert [path.name for path in folder.parent.iterdir()] == [folder.name]
                edition = number
    assert killed > MOMENTS // 4
    assert replaced > 0


def test_a_checkpoint_is_never_lost(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "runs" / "student"
    card = read_card(checkpoint)

    def write(edition: int) -> None:
        source = tmp_path / "sources" / str(edition)
        copy_checkpoint(checkpoint, source)
        (source / CARD_NAME).write_text(card.model_copy(update={"seed": edition}).model_dump_json())
        copy_checkpoint(source, folder)

    kill_writers(folder, write, lambda: load_checkpoint(folder)[1].seed)


def test_a_kit_is_never_lost(tmp_path: Path, kit: Kit) -> None:
    folder = tmp_path / "kits" / "kit"
    preparation: Any = SimpleNamespace(
        options=PrepareOptions(),
        student=kit.student,
        graphs=kit.graphs,
        verification=kit.verification,
        export_difference=0.0,
    )

    def write(edition: int) -> None:
        write_kit(preparation, folder, ("fp32",), ("fp32",), str(edition))

    kill_writers(folder, write, lambda: int(open_kit(folder).manifest.command))


def test_a_package_is_never_lost(tmp_path: Path, packages: dict[Precision, Path]) -> None:
    folder = tmp_path / "engines" / "engine"
    manifest = read_manifest(packages["int8"])

    def write(edition: int) -> None:
        with replace_folder(folder) as new:
            shutil.copytree(packages["int8"], new, dirs_exist_ok=True)
            update = {"version": next_version(folder), "build_command": str(edition)}
            write_manifest(new, manifest.model_copy(update=update))

    def read() -> int:
        manifest = read_manifest(folder)
        read_artefact(folder, manifest)
        return int(manifest.build_command)

    kill_writers(folder, write, read)
