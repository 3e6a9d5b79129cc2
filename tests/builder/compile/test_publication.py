"""A package appears whole or not at all, whatever happens to the process that makes it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import builder.compile.publication
from builder.compile.publication import PublicationError, staging
from runtime.manifest import EngineError, Manifest, Precision, check_artefact, read_manifest, sha256_of


@pytest.fixture
def manifest(packages: dict[Precision, Path]) -> Manifest:
    return read_manifest(packages["int8"])


def publish(destination: Path, manifest: Manifest, content: bytes) -> Manifest:
    """A package whose artefact is `content`, published at `destination`."""
    with staging(destination) as stage:
        artefact = stage.folder / manifest.provenance.artefact
        artefact.write_bytes(content)
        provenance = manifest.provenance.model_copy(update={"artefact_sha256": sha256_of(artefact)})
        return stage.publish(manifest.model_copy(update={"provenance": provenance}))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.is_dir())


def test_published_package_is_valid_and_alone(tmp_path: Path, manifest: Manifest) -> None:
    publish(tmp_path / "engine", manifest, b"blob")

    assert check_artefact(tmp_path / "engine", read_manifest(tmp_path / "engine")).read_bytes() == b"blob"
    assert hidden(tmp_path) == []


def test_each_replacement_is_a_new_version(tmp_path: Path, manifest: Manifest) -> None:
    versions = [publish(tmp_path / "engine", manifest, content).version for content in (b"1", b"2", b"3")]

    assert versions == ["1", "2", "3"]
    assert read_manifest(tmp_path / "engine").version == "3"
    assert hidden(tmp_path) == []


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staging(tmp_path / "engine") as stage:
            (stage.folder / "engine.blob").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert not (tmp_path / "engine").exists()
    assert hidden(tmp_path) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
import builder.compile.publication as publication
from runtime.manifest import read_manifest

destination, template, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

with publication.staging(destination) as stage:
    (stage.folder / "engine.blob").write_bytes(b"half of a blo")
    if moment == "compiling":
        die()
    (stage.folder / "engine.blob").write_bytes((template / "engine.blob").read_bytes())
    if moment == "before the rename":
        publication._sync = die
    if moment == "after the rename":
        publication.Staging.clean = die
    if moment == "between two renames":
        publication._exchange = lambda new, old: False
        rename = Path.rename
        Path.rename = lambda path, target: rename(path, target) if path == destination else die()
    stage.publish(read_manifest(template))
"""


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize(
    "moment", ["compiling", "before the rename", "after the rename", "between two renames"]
)
def test_killed_build_shows_no_half_package_and_the_next_one_cleans_up(
    tmp_path: Path, packages: dict[Precision, Path], manifest: Manifest, moment: str, replacing: bool
) -> None:
    destination = tmp_path / "engine"
    if replacing:
        publish(destination, manifest, b"old")

    script = [sys.executable, "-c", _KILLED, str(destination), str(packages["int8"]), moment]
    assert subprocess.run(script, check=False).returncode == -signal.SIGKILL

    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    for package in visible:
        check_artefact(package, read_manifest(package))
    if replacing and moment != "between two renames":  # which only file systems without exchange have
        assert visible == [destination]
    publish(destination, manifest, b"new")
    assert (destination / "engine.blob").read_bytes() == b"new"
    assert hidden(tmp_path) == []
    if replacing:  # the old package was not lost at any moment, so its version counts on
        assert read_manifest(destination).version == ("3" if moment == "after the rename" else "2")


def test_reader_finds_a_package_at_every_moment_of_a_replacement(tmp_path: Path, manifest: Manifest) -> None:
    destination = tmp_path / "engine"
    publish(destination, manifest, b"0")
    missing: list[EngineError] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                read_manifest(destination)
            except EngineError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 30):
        publish(destination, manifest, str(number).encode())
    done.set()
    reader.join()

    assert missing == []
    assert read_manifest(destination).version == "30"


def test_replacement_works_where_folders_cannot_be_exchanged(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder.compile.publication, "_exchange", lambda new, old: False)
    publish(tmp_path / "engine", manifest, b"old")

    publish(tmp_path / "engine", manifest, b"new")

    assert (tmp_path / "engine/engine.blob").read_bytes() == b"new"
    assert hidden(tmp_path) == []


def test_two_builds_of_one_package_do_not_mix(tmp_path: Path, manifest: Manifest) -> None:
    with staging(tmp_path / "engine") as stage:
        (stage.folder / "engine.blob").write_bytes(b"first")
        with pytest.raises(PublicationError, match="another process is building"):
            publish(tmp_path / "engine", manifest, b"second")
        assert (stage.folder / "engine.blob").read_bytes() == b"first"


def test_what_is_no_engine_package_is_not_replaced(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/thesis.tex").write_text("years of work")

    with pytest.raises(PublicationError, match=r"Move .* out of the way"):
        publish(tmp_path / "engine", manifest, b"blob")

    assert (tmp_path / "engine/thesis.tex").read_text() == "years of work"
