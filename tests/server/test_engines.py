"""Engines at run time: listed, loaded, switched, unloaded, refused, watched."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from running import Running, running, wait_until
from tiny_engine import write_package

from runtime.engine import Engine, Options
from runtime.finite import check_finite
from runtime.loading import load_engine
from runtime.manifest import EngineError
from server.registry import resolve_engines
from server.settings import Settings

Encode = Callable[..., bytes]


@pytest.fixture
def directory(engine_dir: Path, tmp_path: Path) -> Path:
    """An engine directory of the test's own."""
    return Path(shutil.copytree(engine_dir, tmp_path / "engines"))


@pytest.fixture
def served(directory: Path) -> Iterator[Running]:
    with running(Settings(engine="tiny", engine_dir=directory, port=0)) as it:
        yield it


def _states(server: Running) -> dict[str, str]:
    return {row["name"]: row["state"] for row in server.client.get("/engines").json()["engines"]}


def _problem(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["type"].rpartition(":")[2]


def test_the_list_tells_what_is_loaded_and_what_could_be(served: Running) -> None:
    listing = served.client.get("/engines").json()
    assert listing["default"] == "tiny"
    rows = {row["name"]: row for row in listing["engines"]}
    assert rows["tiny"] == {
        "name": "tiny",
        "state": "loaded",
        "default": True,
        "version": "1",
        "backend": "openvino",
        "precision": "fp32",
        "activation": "softmax",
        "classes": 10,
        "height": 32,
        "width": 32,
        "max_batch": 8,
        "reason": None,
    }
    assert (rows["other"]["state"], rows["other"]["default"]) == ("available", False)


def test_ready_means_that_every_named_engine_is_loaded(directory: Path) -> None:
    with running(Settings(engine="tiny,other", engine_dir=directory, port=0)) as server:
        assert _states(server) == {"tiny": "loaded", "other": "loaded"}
        assert server.client.get("/health/ready").json()["engine"] == "tiny"


def test_load_switch_and_unload(served: Running, encode: Encode) -> None:
    image = encode(1)
    assert _problem(served.predict(image, params={"engine": "other"})) == (404, "engine-not-found")
    assert served.client.post("/engines/other/load").json()["state"] == "loaded"
    assert served.predict(image, params={"engine": "other"}).json()["engine"]["name"] == "other"
    assert served.predict(image).json()["engine"]["name"] == "tiny"
    assert served.client.put("/engines/default", json={"name": "other"}).json() == {"name": "other"}
    assert served.predict(image).json()["engine"]["name"] == "other"
    assert served.client.post("/engines/tiny/unload").json()["state"] == "available"
    assert _states(served) == {"tiny": "available", "other": "loaded"}
    assert _problem(served.predict(image, params={"engine": "tiny"})) == (404, "engine-not-found")


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What was there at the start is never collected anyway (`gc.freeze`)."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_an_engine_that_is_replaced_unloaded_or_refused_is_freed_at_once(
    directory: Path, encode: Encode
) -> None:
    engines: list[weakref.ref[Engine]] = []

    def load(folder: Path) -> Engine:
        engine = load_engine(folder, Options(slots=1))
        engines.append(weakref.ref(engine))
        if len(engines) == 4:
            monkeypatched.setattr(engine, "open_slot", lambda: check_finite(np.array([np.nan])))
        return engine

    def freed() -> list[bool]:
        return [engine() is None for engine in engines]

    with (
        pytest.MonkeyPatch.context() as monkeypatched,
        running(Settings(engine="tiny,other", engine_dir=directory, port=0), load) as served,
    ):
        assert served.predict(encode(0), params={"engine": "other"}).status_code == 200
        assert served.client.post("/engines/other/unload").status_code == 200
        wait_until(lambda: freed() == [False, True])
        assert served.predict(encode(0)).status_code == 200
        assert served.client.post("/engines/tiny/load").status_code == 200
        wait_until(lambda: freed() == [True, True, False])
        assert _problem(served.client.post("/engines/other/load")) == (409, "engine-refused")
        monkeypatched.undo()
        wait_until(lambda: freed() == [True, True, False, True])
    wait_until(lambda: all(freed()))


def test_the_default_engine_cannot_be_unloaded(served: Running, encode: Encode) -> None:
    assert _problem(served.client.post("/engines/tiny/unload")) == (409, "engine-in-use")
    assert served.predict(encode(0)).status_code == 200


def test_what_does_not_exist_cannot_be_managed(served: Running) -> None:
    missing = (404, "engine-not-found")
    assert _problem(served.client.post("/engines/nobody/load")) == missing
    assert _problem(served.client.post("/engines/nobody/unload")) == missing
    for name in ("nobody", ""):
        assert _problem(served.client.put("/engines/default", json={"name": name})) == missing
    assert _problem(served.client.post("/engines/..%2Ftiny/load"))[0] == 404
    assert _problem(served.client.post("/engines/.hidden/load")) == (422, "invalid-parameter")
    assert served.client.get("/health/ready").status_code == 200


def test_a_newer_version_replaces_the_running_one(served: Running, directory: Path, encode: Encode) -> None:
    write_package(directory, "tiny", version="2", seed=7)
    assert served.predict(encode(0)).json()["engine"]["version"] == "1"
    assert served.client.post("/engines/tiny/load").json()["version"] == "2"
    assert served.predict(encode(0)).json()["engine"]["version"] == "2"


def _damage(folder: Path) -> None:
    with (folder / "engine.blob").open("r+b") as file:
        file.seek(100)
        file.write(b"damaged")


def _outdate(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backend_version":"', '"backend_version":"2001.1-'))


def _behead(folder: Path) -> None:
    (folder / "engine.blob").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(_damage, "damaged or changed"), (_outdate, "built by OpenVINO 2001.1"), (_behead, "has no")],
)
def test_a_bad_package_is_refused_and_the_running_engine_serves_on(
    served: Running, directory: Path, encode: Encode, spoil: Callable[[Path], None], reason: str
) -> None:
    before = served.predict(encode(0)).json()["results"][0]["predictions"]
    spoil(write_package(directory, "tiny", version="2", seed=7))
    refused = served.client.post("/engines/tiny/load")
    assert _problem(refused) == (409, "engine-refused")
    assert reason in refused.json()["detail"]
    assert "trimrt build tiny" in refused.json()["detail"], "the remedy is missing"
    answer = served.predict(encode(0)).json()
    assert answer["engine"]["version"] == "1"
    assert answer["results"][0]["predictions"] == before


def test_an_unreadable_manifest_is_listed_as_refused(served: Running, directory: Path) -> None:
    (directory / "broken").mkdir()
    (directory / "broken" / "manifest.json").write_text("{}")
    rows = {row["name"]: row for row in served.client.get("/engines").json()["engines"]}
    assert rows["broken"]["state"] == "refused"
    assert "not a valid engine manifest" in rows["broken"]["reason"]
    assert _problem(served.client.post("/engines/broken/load")) == (404, "engine-not-found")


def test_unfinished_packages_are_invisible(served: Running, directory: Path) -> None:
    (directory / "tiny-v1").rename(directory / ".tiny-v1.partial")
    assert _states(served) == {"tiny": "loaded", "other": "available"}
    assert served.client.post("/engines/tiny/load").status_code == 409  # known, but its folder is gone


def test_watching_picks_up_new_and_newer_packages_and_survives_bad_ones(
    directory: Path, encode: Encode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(engine="tiny", engine_dir=directory, port=0, watch=True, watch_interval_s=0.02)
    made = tmp_path / "made"
    third = write_package(made, "third")
    newer = write_package(made, "tiny", version="2", seed=3)
    bad = write_package(made, "tiny", version="3", seed=4)
    _damage(bad)
    with running(settings) as server:
        third.rename(directory / "third")
        wait_until(lambda: _states(server).get("third") == "loaded")
        bad.rename(directory / "tiny-v3")
        wait_until(lambda: "damaged or changed" in str([vars(record) for record in caplog.records]))
        assert server.predict(encode(0)).json()["engine"]["version"] == "1"
        shutil.rmtree(directory / "tiny-v3")
        newer.rename(directory / "tiny-v2")
        wait_until(lambda: server.predict(encode(0)).json()["engine"]["version"] == "2")


def test_a_watcher_of_an_empty_folder_waits_and_serves_the_first_engine_that_it_can(
    encode: Encode, tmp_path: Path
) -> None:
    directory, made = tmp_path / "engines", tmp_path / "made"
    directory.mkdir()
    bad, good = write_package(made, "bad"), write_package(made, "good")
    _damage(bad)
    settings = Settings(engine_dir=directory, port=0, watch=True, watch_interval_s=0.02)

    def why() -> str:
        return server.client.get("/health/ready").json()["detail"]

    with running(settings, until=503) as server:
        wait_until(lambda: why() == "no engine is loaded yet")
        assert server.client.get("/health/live").status_code == 200
        assert server.predict(encode(0)).status_code == 503
        bad.rename(directory / "bad")
        wait_until(lambda: "damaged or changed" in why())
        good.rename(directory / "good")
        wait_until(lambda: server.client.get("/health/ready").status_code == 200)
        assert server.predict(encode(0)).json()["engine"]["name"] == "good"


def test_an_engine_replaced_while_the_body_comes_in_loses_no_request(
    served: Running, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    image = encode(3)

    def slowly() -> Iterator[bytes]:
        yield image[:100]
        assert served.client.post("/engines/tiny/load").status_code == 200
        yield image[100:]

    with httpx.Client(base_url=served.url) as client:
        answer = client.post("/predict", content=slowly(), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200
    best = answer.json()["results"][0]["predictions"][0]["index"]
    assert best == int(reference(image).argmax())


def test_switching_and_reloading_under_load_drops_and_confuses_nothing(
    directory: Path, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    """Two versions of one name, and two names, with answers known beforehand."""
    images = [encode(seed) for seed in range(20)]
    expected = {
        name: [int(reference(image, folder).argmax()) for image in images]
        for name, folder in (("tiny", "tiny-v1"), ("other", "other-v1"))
    }
    assert expected["tiny"] != expected["other"]
    with running(Settings(engine="tiny,other", engine_dir=directory, port=0)) as server:
        enough = threading.Event()

        def ask(number: int) -> int:
            asked = 0
            while not enough.is_set() or asked < 20:
                answer = server.predict(images[number % 20])
                assert answer.status_code == 200, answer.text
                answer = answer.json()
                label = answer["results"][0]["predictions"][0]["index"]
                assert label == expected[answer["engine"]["name"]][number % 20]
                number, asked = number + 1, asked + 1
            return asked

        with ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(ask, number) for number in range(16)]
            try:
                for default in ("other", "tiny") * 2:
                    answer = server.client.put("/engines/default", json={"name": default})
                    assert answer.status_code == 200
                    assert server.client.post("/engines/tiny/load").status_code == 200
            finally:
                enough.set()
            assert sum(client.result() for client in clients) >= 320


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("nobody", "no engine 'nobody'.*it holds other, tiny.*trimrt build"),
        ("", "holds 2 engine packages; choose with --engine"),
    ],
)
def test_what_cannot_be_served_is_said_with_the_remedy(engine_dir: Path, engine: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        resolve_engines(Settings(engine=engine, engine_dir=engine_dir))


def test_an_empty_engine_directory_names_the_command_that_fills_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="`trimrt build` makes one"):
        resolve_engines(Settings(engine_dir=tmp_path / "none"))


def test_a_package_is_also_found_by_its_path(engine_dir: Path, tmp_path: Path) -> None:
    settings = Settings(engine=str(engine_dir / "other-v1"), engine_dir=tmp_path)
    assert resolve_engines(settings) == [engine_dir / "other-v1"]
