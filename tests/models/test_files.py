"""Files and folders are replaced whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import killed_writers
import pytest
from killed_writers import names, read_folder, write_file, write_folder

from models import files
from models.files import BusyError, clear_folder, locked, replace_file, replace_folder, restore_in


@pytest.fixture(
    params=[
        pytest.param(True, id="exchange"),
        pytest.param(False, id="no exchange"),
    ]
)
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange two folders."""
    supported: bool = request.param
    if not supported:
        monkeypatch.setattr(files, "_exchange", lambda new, old: False)
    return supported


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path: Path, exchange: bool) -> None:
    folder = tmp_path / "parents" / "are made"

    for content in ("first", "second"):
        write_folder(folder, content)

        assert read_folder(folder) == content
        assert names(folder.parent) == ["are made"]
        assert names(folder) == ["a", "b"]


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "parents" / "are made"

    for content in ("first", "second"):
        write_file(path, content)

        assert path.read_text() == content
        assert names(path.parent) == ["are made"]


def test_a_failed_writer_leaves_the_old_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "old")

    def fail() -> None:
        with replace_folder(tmp_path / "folder") as new:
            (new / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert read_folder(tmp_path / "folder") == "old"
    assert names(tmp_path) == ["folder"]


def test_a_failed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "old")

    def fail() -> None:
        with replace_file(tmp_path / "file") as new:
            new.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def found_after_deaths(action: str, folder: Path) -> list[str]:
    command = [sys.executable, killed_writers.__file__, action, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return list(json.loads(subprocess.check_output(command, env=environment)))


@pytest.mark.parametrize("action", ["folder", "folder without exchange", "file"])
def test_what_is_written_by_one_who_is_killed_at_any_step_is_old_or_new(tmp_path: Path, action: str) -> None:
    found = found_after_deaths(action, tmp_path)

    assert found == sorted(found, reverse=True)  # old until one moment, new from then on
    assert set(found) == {"old", "new"}


def test_a_reader_that_is_killed_while_it_restores_a_folder_loses_nothing(tmp_path: Path) -> None:
    assert set(found_after_deaths("reader", tmp_path)) == {"old"}


def test_folders_that_were_moved_aside_are_restored_with_their_parent(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / name, name)
        (tmp_path / name).rename(tmp_path / f".{name}.old")

    restore_in(tmp_path)

    assert names(tmp_path) == ["one", "two"]


def test_a_second_writer_of_a_folder_is_told_of_the_first(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "folder") as new:
        (new / "a").write_text("first")
        with pytest.raises(BusyError, match="another process is writing"):
            write_folder(tmp_path / "folder", "second")

    assert (tmp_path / "folder" / "a").read_text() == "first"
    assert names(tmp_path) == ["folder"]


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    """Each sees what the one before it wrote, so no number is lost."""
    path = tmp_path / "number"
    write_file(path, "0")

    def count() -> None:
        for _ in range(20):
            with replace_file(path) as new:
                new.write_text(str(int(path.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert path.read_text() == "80"
    assert names(tmp_path) == ["number"]


def test_writers_of_a_cache_take_turns(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    found = []

    def write() -> None:
        with replace_folder(folder, cache=True) as new:
            assert list(new.iterdir()) == []
            (new / "a").touch()
            found.append(sorted(path.name for path in tmp_path.iterdir()))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert names(tmp_path) == ["folder"]


def test_a_reader_finds_a_folder_at_every_moment_of_a_replacement(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, "0")
    done = threading.Event()
    missing = []

    def read() -> None:
        while not done.is_set():
            if not (folder / "a").exists():
                missing.append(folder)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        write_folder(folder, str(number))
    done.set()
    reader.join()

    assert missing == []


def test_a_link_to_a_folder_is_replaced_and_what_it_points_to_is_kept(tmp_path: Path, exchange: bool) -> None:
    write_folder(tmp_path / "target", "kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")

    write_folder(tmp_path / "link", "new")

    assert read_folder(tmp_path / "link") == "new"
    assert not (tmp_path / "link").is_symlink()
    assert read_folder(tmp_path / "target") == "kept"
    assert names(tmp_path) == ["link", "target"]


def test_a_folder_is_cleared(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "content")

    clear_folder(tmp_path / "folder")

    assert names(tmp_path / "folder") == []


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "kept")
    with (
        pytest.raises(OSError, match="No space left on device") as raised,
        replace_file(tmp_path / "file"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert raised.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    assert names(tmp_path) == ["file"]


def test_a_lock_that_is_not_to_be_waited_for_keeps_others_out(tmp_path: Path) -> None:
    with locked(tmp_path / "a", wait=False):
        with pytest.raises(BusyError, match="another process is writing"), locked(tmp_path / "a", wait=False):
            pytest.fail("both have it")
        with locked(tmp_path / "b", wait=False):
            pass
    with locked(tmp_path / "a", wait=False):
        assert names(tmp_path) == [".a.lock"]
    assert names(tmp_path) == []
