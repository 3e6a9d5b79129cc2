"""A package is published whole, as the next version of the one it replaces, or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from builder.compile.publication import PublicationError, next_version
from builder.kit import Kit
from models.files import replace_folder
from runtime.manifest import Precision, read_artefact, read_manifest

NAME = "tiny-digits-fp32-openvino"


def arguments(kit: Kit, output: Path) -> list[str]:
    return ["build", str(kit.path), "-p", "fp32", "--target", "openvino", "-o", str(output)]


def test_a_package_counts_the_versions_of_the_one_it_replaces(
    kit: Kit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    for version in ("1", "2"):
        assert trimrt(*arguments(kit, tmp_path)).exit_code == 0

        manifest = read_manifest(tmp_path / NAME)
        assert manifest.version == version
        assert read_artefact(tmp_path / NAME, manifest)
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


_KILLED = """
import os, signal, sys
from builder.compile import packages
from trimrt.cli import main

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(packages, sys.argv[1], die)
main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", ["engine_logits", "measure", "write_manifest"])
def test_a_killed_build_publishes_nothing_and_the_next_one_cleans_up(
    kit: Kit, tmp_path: Path, moment: str, trimrt: Callable[..., Result]
) -> None:
    command = [sys.executable, "-c", _KILLED, moment, *arguments(kit, tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []

    assert trimrt(*arguments(kit, tmp_path)).exit_code == 0

    assert read_manifest(tmp_path / NAME).version == "1"
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_two_builds_of_one_package_do_not_mix(
    kit: Kit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    with replace_folder(tmp_path / NAME) as first:
        (first / "engine.blob").write_bytes(b"first")
        second = trimrt(*arguments(kit, tmp_path))

    assert second.exit_code == 1
    assert "another process is writing" in second.output
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["engine.blob"]


def test_what_is_no_engine_package_is_not_replaced(
    kit: Kit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "thesis.tex").write_text("years of work")

    result = trimrt(*arguments(kit, tmp_path))

    assert result.exit_code == 1
    assert f"Move {tmp_path / NAME} out of the way" in " ".join(result.output.split())
    assert (tmp_path / NAME / "thesis.tex").read_text() == "years of work"


def test_a_package_that_was_moved_aside_counts(tmp_path: Path, packages: dict[Precision, Path]) -> None:
    """Its writer was killed where folders cannot be exchanged."""
    manifest = read_manifest(packages["fp32"])
    (tmp_path / ".engine.old").mkdir()
    (tmp_path / ".engine.old/manifest.json").write_text(manifest.model_dump_json())

    with replace_folder(tmp_path / "engine"):
        assert next_version(tmp_path / "engine") == "2"


def test_a_damaged_package_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/manifest.json").write_text("{}")

    with pytest.raises(PublicationError, match="is not a valid engine manifest"):
        next_version(tmp_path / "engine")
