"""A server that trusts a key loads what that key has signed, and nothing else, however it is asked to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from processes import start_process
from running import Running, running, wait_until
from signing import Signer

from runtime.manifest import MANIFEST_NAME, EngineError
from runtime.signatures import SIGNATURE_NAME
from server.settings import Settings

Encode = Callable[..., bytes]


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.new(tmp_path / "keys")


@pytest.fixture
def directory(engine_dir: Path, tmp_path: Path, signer: Signer) -> Path:
    """An engine directory where `tiny` is signed and `other` is not."""
    directory = Path(shutil.copytree(engine_dir, tmp_path / "engines"))
    signer.sign(directory / "tiny-v1")
    return directory


def settings(directory: Path, signer: Signer, **others: object) -> Settings:
    return Settings.model_validate(
        {"engine_dir": directory, "port": 0, "trusted_key": str(signer.public), **others}
    )


@pytest.fixture
def served(directory: Path, signer: Signer) -> Iterator[Running]:
    with running(settings(directory, signer)) as it:
        yield it


def reason(server: Running | httpx.Client, name: str) -> str:
    """Why a package is refused, by the list of engines; empty while it is not."""
    client = server.client if isinstance(server, Running) else server
    rows = {row["name"]: row for row in client.get("/engines").json()["engines"]}
    return str(rows.get(name, {}).get("reason"))


def test_of_several_packages_the_signed_one_is_served(served: Running, encode: Encode) -> None:
    assert served.predict(encode(1)).json()["engine"]["name"] == "tiny"
    assert "is not signed" in reason(served, "other-v1")


@pytest.mark.parametrize("name", ["other", "tiny"])
def test_a_package_that_is_not_signed_as_it_is_is_not_begun_with(
    name: str, directory: Path, signer: Signer
) -> None:
    with (directory / "tiny-v1" / "engine.blob").open("ab") as file:
        file.write(b"\n")
    says = {"other": "other-v1 is not signed", "tiny": "engine.blob was changed since it was signed"}
    with (
        pytest.raises(EngineError, match=says[name]),
        running(settings(directory, signer, engine=str(directory / f"{name}-v1"))),
    ):
        pass


def test_managing_loads_a_package_once_it_is_signed(served: Running, directory: Path, signer: Signer) -> None:
    refused = served.client.post("/engines/other/load")
    assert refused.status_code == 404, "nothing of it was read, not even its name"
    signer.sign(directory / "other-v1")
    assert served.client.post("/engines/other/load").json()["state"] == "loaded"


def swapped(directory: Path) -> None:
    shutil.copy(directory / "tiny-v1" / SIGNATURE_NAME, directory / "other-v1" / SIGNATURE_NAME)


def truncated(directory: Path) -> None:
    os.truncate(directory / "other-v1" / SIGNATURE_NAME, 300)


def by_someone_else(directory: Path) -> None:
    Signer.new(directory.parent, "someone").sign(directory / "other-v1")


def with_another_blob(directory: Path) -> None:
    shutil.copy(directory / "tiny-v1" / "engine.blob", directory / "other-v1" / "engine.blob")


def with_more_files(directory: Path) -> None:
    (directory / "other-v1" / "tuning.json").write_text("{}")


def with_link_as_manifest(directory: Path) -> None:
    (directory / "other-v1" / MANIFEST_NAME).unlink()
    (directory / "other-v1" / MANIFEST_NAME).symlink_to(directory / "tiny-v1" / MANIFEST_NAME)


SPOILED = [swapped, truncated, by_someone_else, with_another_blob, with_more_files, with_link_as_manifest]


@pytest.mark.parametrize("spoil", SPOILED)
def test_managing_does_not_load_what_was_changed_since_it_was_signed(
    spoil: Callable[[Path], None], served: Running, directory: Path, signer: Signer, encode: Encode
) -> None:
    signer.sign(directory / "other-v1")
    spoil(directory)
    refused = served.client.post("/engines/other/load")
    assert refused.status_code in (404, 409)
    assert served.predict(encode(1), params={"engine": "other"}).status_code == 404
    assert "sign" in reason(served, "other-v1")
    assert served.predict(encode(1)).json()["engine"]["name"] == "tiny"


def test_watching_loads_a_package_once_it_is_signed(directory: Path, signer: Signer) -> None:
    watched = settings(directory, signer, watch=True, watch_interval_s=0.02)
    with running(watched) as server:
        shutil.copytree(directory / "other-v1", directory / "third")
        wait_until(lambda: "is not signed" in reason(server, "third"))
        assert set(server.service.registry.loaded) == {"tiny"}
        signer.sign(directory / "third")
        wait_until(lambda: set(server.service.registry.loaded) == {"tiny", "other"})
        with (directory / "tiny-v1" / "engine.blob").open("ab") as file:
            file.write(b"\n")
        wait_until(lambda: "changed since it was signed" in reason(server, "tiny-v1"))
        assert set(server.service.registry.loaded) == {"tiny", "other"}, "what ran before still runs"


def test_every_worker_trusts_the_same_keys(directory: Path, signer: Signer, tmp_path: Path) -> None:
    options = ["--engine-dir", str(directory), "--workers", "2", "--log-format", "json"]
    with start_process(options, tmp_path / "log", TRIMRT_TRUSTED_KEY=str(signer.public)) as started:
        signer.public.unlink()  # it was read at the start
        with httpx.Client(base_url=started.url) as client:
            assert client.post("/engines/other/load").status_code == 404
            assert "is not signed" in reason(client, "other-v1")
            signer.sign(directory / "other-v1")
            loaded = client.post("/engines/other/load")
            assert loaded.json()["state"] == "loaded", loaded.text
            assert client.get("/stats").json()["workers"] == {"running": 2, "replaced": 0, "lost_requests": 0}
