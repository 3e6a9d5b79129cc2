"""Packages in a directory: whatever lies there, each is either usable or refused with the reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from spoiled_packages import SPOILED, UNREADABLE, obey_permissions, spoil_all

from runtime.loading import load_engine
from runtime.manifest import EngineError, read_artefact, read_manifest
from runtime.packages import find_package, find_packages, stamp_of


@pytest.mark.parametrize(("name", "reason"), [(name, reason) for name, (_, reason) in SPOILED.items()])
def test_a_bad_package_is_refused_with_the_reason(
    engine_dir: Path, tmp_path: Path, name: str, reason: str
) -> None:
    spoil_all(engine_dir / "tiny-v1", tmp_path, {name: SPOILED[name]})
    shutil.copytree(engine_dir / "other-v1", tmp_path / "other")
    packages = find_packages(tmp_path)
    refused = packages.pop(tmp_path / name)
    assert isinstance(refused, EngineError)
    assert re.search(reason, str(refused))
    assert len(str(refused)) < 1000
    assert [folder.name for folder in packages] == ["other"]
    assert find_package(tmp_path, "other") == tmp_path / "other"
    with pytest.raises(EngineError, match=reason):
        load_engine(tmp_path / name)


def test_what_may_not_be_read_is_refused_with_the_reason(engine_dir: Path, tmp_path: Path) -> None:
    spoil_all(engine_dir / "tiny-v1", tmp_path, UNREADABLE)
    shutil.copytree(engine_dir / "other-v1", tmp_path / "other")
    program = (
        "import sys; from pathlib import Path; from runtime.packages import find_packages\n"
        "for folder, found in find_packages(Path(sys.argv[1])).items(): print(folder.name, '|', found)"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = dict(line.split(" | ", 1) for line in child.stdout.splitlines())
    assert found.keys() == {"other", *UNREADABLE}
    for name, (_, reason) in UNREADABLE.items():
        assert reason in found[name]
    assert "name='other'" in found["other"]


def test_what_is_no_package_is_left_out(engine_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny")
    shutil.copytree(engine_dir / "tiny-v1", tmp_path / ".unfinished")
    (tmp_path / "notes").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "nowhere").symlink_to("/nowhere")
    assert list(find_packages(tmp_path)) == [tmp_path / "tiny"]
    assert find_packages(tmp_path / "none") == find_packages(tmp_path / "manifest.json") == {}


@pytest.mark.parametrize("spoil", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_an_artefact_is_a_file_or_refused(engine_dir: Path, tmp_path: Path, spoil) -> None:
    folder = Path(shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny"))
    (folder / "engine.blob").unlink()
    spoil(folder / "engine.blob")
    with pytest.raises(EngineError, match="not a regular file"):
        load_engine(folder)


def test_an_empty_artefact_is_refused_even_if_the_hash_says_so(engine_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny"))
    manifest = read_manifest(folder)
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    provenance = manifest.provenance.model_copy(update={"artefact_sha256": nothing})
    (folder / "engine.blob").write_bytes(b"")
    with pytest.raises(EngineError, match="damaged or changed"):
        read_artefact(folder, manifest.model_copy(update={"provenance": provenance}))


def test_of_an_artefact_no_more_is_read_than_the_manifest_says(engine_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny"))
    size = (folder / "engine.blob").stat().st_size
    os.truncate(folder / "engine.blob", 1 << 40)  # more than fits in memory
    with pytest.raises(EngineError, match=rf"larger than {size:,} bytes; rebuild it: trimrt build tiny"):
        load_engine(folder)


def test_a_stamp_changes_with_any_file_and_with_nothing_else(engine_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engine_dir / "tiny-v1", tmp_path / "tiny"))
    blob = folder / "engine.blob"
    stamps = [stamp_of(folder)]
    read_manifest(folder)
    assert stamp_of(folder) == stamps[0]
    times = blob.stat()
    blob.write_bytes(bytes(times.st_size))
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and `cp -p` do
    stamps.append(stamp_of(folder))
    (folder / "dangling").symlink_to("/nowhere")
    stamps.append(stamp_of(folder))
    blob.unlink()
    stamps.append(stamp_of(folder))
    shutil.rmtree(folder)
    stamps.append(stamp_of(folder))
    assert len(set(stamps)) == len(stamps)
