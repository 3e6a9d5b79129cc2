"""Nothing that lies in the engine directory stops the server, its list of engines or its watch."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from processes import TRIMRT, Started, start_process
from running import Running, running, wait_until
from spoiled_packages import SPOILED, UNREADABLE, obey_permissions, spoil_all
from spoiling import mend
from tiny_engine import write_package

from runtime.engine import Engine, Options
from runtime.loading import load_engine
from runtime.manifest import EngineError
from runtime.watching import Watcher
from server.registry import Load, Registry, resolve_engines
from server.settings import Settings
from server.telemetry import Telemetry

Encode = Callable[..., bytes]

EVERYTHING = {**SPOILED, **UNREADABLE}


def rows(url: str) -> dict[tuple[str, str], str | None]:
    """Names and states, and the reason of each."""
    response = httpx.get(f"{url}/engines")
    assert response.status_code == 200
    return {(row["name"], row["state"]): row["reason"] for row in response.json()["engines"]}


def refusals(log: Path) -> list[str]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry["reason"] for entry in entries if entry["message"] == "engine package refused"]


@pytest.fixture
def started(engine_dir: Path, tmp_path: Path) -> Iterator[Started]:
    """A server that was started, without being told which engine, on a directory where all else is bad."""
    directory = tmp_path / "engines"
    spoil_all(engine_dir / "tiny-v1", directory, EVERYTHING)
    shutil.copytree(engine_dir / "tiny-v1", directory / "tiny")
    options = ["--engine-dir", str(directory), "--log-format", "json"]
    options += ["--watch", "--watch-interval-s", "0.02"]
    with start_process(options, tmp_path / "log.json", before=obey_permissions) as it:
        yield it


def test_it_starts_lists_and_watches_beside_everything_bad(
    started: Started, engine_dir: Path, tmp_path: Path
) -> None:
    listed = rows(started.url)
    assert ("tiny", "loaded") in listed
    for name, (_, reason) in EVERYTHING.items():
        assert re.search(reason, listed[name, "refused"] or "")

    directory = tmp_path / "engines"
    later = tmp_path / "later"
    spoil_all(engine_dir / "tiny-v1", later, {f"later {name}": kind for name, kind in EVERYTHING.items()})
    shutil.copytree(engine_dir / "other-v1", later / "other")
    for (
        folder
    ) in later.iterdir():  # whole at once: half of a copy may be seen, and refused for another reason
        folder.rename(directory / folder.name)
    wait_until(lambda: ("other", "loaded") in rows(started.url))
    wait_until(lambda: len(refusals(started.log)) == len(EVERYTHING))
    (directory / "unreadable manifest" / "manifest.json").chmod(0o644)
    write_package(later, "third").rename(directory / "third")
    wait_until(lambda: ("third", "loaded") in rows(started.url))
    assert len(refusals(started.log)) == len(EVERYTHING), "each is logged once"
    assert "Traceback" not in started.log.read_text()


@pytest.mark.parametrize("name", SPOILED)
def test_a_bad_package_that_is_to_be_served_is_refused_with_the_reason(
    engine_dir: Path, tmp_path: Path, name: str
) -> None:
    spoil_all(engine_dir / "tiny-v1", tmp_path, {name: SPOILED[name]})
    for engine in ("", name, str(tmp_path / name)):
        with pytest.raises(EngineError, match=SPOILED[name][1]):
            resolve_engines(Settings(engine=engine, engine_dir=tmp_path))


def test_the_server_says_so_in_one_line(engine_dir: Path, tmp_path: Path) -> None:
    spoil_all(engine_dir / "tiny-v1", tmp_path, UNREADABLE)
    done = subprocess.run(
        [TRIMRT, "serve", "--port", "0", "--engine-dir", str(tmp_path)],
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: no engine package in {tmp_path} can be used: ")
    assert line.count("Permission denied") == len(UNREADABLE)


@pytest.fixture
def watched(engine_dir: Path, tmp_path: Path) -> Iterator[Running]:
    """A server that watches `engines` and serves `tiny`."""
    mend_all(engine_dir, tmp_path / "engines")
    settings = Settings(
        engine="tiny", engine_dir=tmp_path / "engines", port=0, watch=True, watch_interval_s=0.02
    )
    with running(settings) as it:
        yield it


def mend_all(engine_dir: Path, directory: Path) -> None:
    directory.mkdir()
    mend(directory / "tiny", engine_dir / "tiny-v1")


def test_a_directory_that_vanishes_and_comes_back_is_watched_on(
    watched: Running, engine_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "engines").rename(tmp_path / "away")
    assert rows(watched.url) == {("tiny", "loaded"): None}
    shutil.copytree(engine_dir / "other-v1", tmp_path / "away" / "other")
    (tmp_path / "away").rename(tmp_path / "engines")
    wait_until(lambda: ("other", "loaded") in rows(watched.url))


def test_a_package_is_loaded_once_it_holds_still(engine_dir: Path, tmp_path: Path) -> None:
    loaded: list[Path] = []

    def load(folder: Path) -> Engine:
        loaded.append(folder)
        return load_engine(folder, Options(slots=1))

    async def copy_while_watched() -> None:
        registry = Registry(Settings(engine_dir=tmp_path), Telemetry(), load)
        watcher = Watcher(lambda folder: registry.change(Load(folder)), tmp_path)
        folder = tmp_path / "other"
        folder.mkdir()
        shutil.copy(engine_dir / "other-v1" / "manifest.json", folder)
        await watcher.look()
        blob = (engine_dir / "other-v1" / "engine.blob").read_bytes()
        with (folder / "engine.blob").open("wb", buffering=0) as file:
            for part in (blob[:1000], blob[1000:-1], blob[-1:]):
                file.write(part)
                await watcher.look()
        assert loaded == []
        await watcher.look()
        await watcher.look()
        assert loaded == [folder], "once"
        assert list(registry.loaded) == ["other"]
        await registry.close()

    asyncio.run(copy_while_watched())


def test_a_failure_that_nobody_thought_of_does_not_end_the_watch(
    engine_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def watch() -> None:
        registry = Registry(Settings(engine_dir=tmp_path), Telemetry())
        watcher = Watcher(lambda folder: registry.change(Load(folder)), tmp_path)
        registry._changing = None  # type: ignore[assignment]  # a mistake of the server's own
        shutil.copytree(engine_dir / "other-v1", tmp_path / "other")
        for _ in range(4):
            await watcher.look()

    asyncio.run(watch())
    assert [record.message for record in caplog.records] == ["an engine package could not be loaded"]


def test_a_package_that_failed_to_load_is_listed_as_refused_until_it_changes(
    watched: Running, engine_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made" / "other"
    shutil.copytree(engine_dir / "other-v1", folder)
    blob = (folder / "engine.blob").read_bytes()
    (folder / "engine.blob").write_bytes(blob[:-1])
    folder.rename(tmp_path / "engines" / "other")
    wait_until(lambda: ("other", "refused") in rows(watched.url))
    assert "damaged or changed" in (rows(watched.url)["other", "refused"] or "")
    refused = watched.client.post("/engines/other/load")
    assert refused.status_code == 409
    (tmp_path / "engines" / "other" / "engine.blob").write_bytes(blob)
    wait_until(lambda: ("other", "loaded") in rows(watched.url))
    assert ("other", "refused") not in rows(watched.url)


def test_a_folders_name_may_be_no_text(watched: Running, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "engines") + b"/\xff\xfe"))
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    wait_until(lambda: "refused" in {state for _, state in rows(watched.url)})
    assert ("\\udcff\\udcfe", "refused") in rows(watched.url)


def test_a_folder_that_was_moved_aside_by_a_killed_writer_is_served_by_its_path(
    engine_dir: Path, tmp_path: Path, encode: Encode
) -> None:
    shutil.copytree(engine_dir / "tiny-v1", tmp_path / ".tiny.old")
    with running(Settings(engine=str(tmp_path / "tiny"), port=0)) as server:
        assert server.predict(encode(0)).status_code == 200
