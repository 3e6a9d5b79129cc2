"""Shadow engines: compared on live images after the answer, and promoted when they have proved themselves."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from running import Running, running, wait_until
from tiny_engine import write_graph_that_fails_on_white, write_package
from wrapped_engine import load_wrapped

from runtime.engine import Engine
from runtime.loading import load_engine
from runtime.manifest import EngineError
from server.settings import Settings

Encode = Callable[..., bytes]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine, and others: with the same answers, other ones, none for white, fewer labels."""
    directory = tmp_path_factory.mktemp("engines")
    write_package(directory, "tiny", seed=0)
    write_package(directory, "same", seed=0, precision="fp16")
    write_package(directory, "other", seed=1)
    write_package(directory, "fragile", seed=0, write_graph=write_graph_that_fails_on_white)
    write_package(directory, "fewer", seed=1, classes=5)
    return directory


@pytest.fixture
def server(engines: Path) -> Iterator[Running]:
    with running(Settings(engine="tiny,same,other,fragile,fewer", engine_dir=engines, port=0)) as it:
        yield it


def _shadow(server: Running, name: str, of: str = "tiny", share: float = 1) -> httpx.Response:
    return server.client.put(f"/engines/{name}/shadow", json={"of": of, "share": share})


def _told(server: Running, name: str) -> dict[str, Any]:
    (engine,) = (it for it in server.client.get("/stats").json()["engines"] if it["engine"] == name)
    return engine["shadow"]


def _compare(server: Running, name: str, encode: Encode, images: int = 10) -> dict[str, Any]:
    """What `/stats` tells once so many more images were compared."""
    before = _told(server, name)["images"]
    for seed in range(images):
        assert server.predict(encode(seed)).json()["engine"]["name"] == "tiny"
        wait_until(lambda: _told(server, name)["images"] == before + seed + 1)  # noqa: B023 - waits here
    return _told(server, name)


def test_an_engine_that_says_the_same_agrees(server: Running, encode: Encode) -> None:
    assert _shadow(server, "same").json() == {"name": "same", "of": "tiny", "share": 1}
    told = _compare(server, "same", encode)
    assert (told["agreement"], told["dropped"], told["failed"]) == (1, 0, 0)
    assert told["mean_difference"] < 1e-3
    for engine in ("inference_ms", "inference_of_ms"):
        assert 0 < told[engine]["p50"] <= told[engine]["p99"]


def test_an_engine_that_says_otherwise_does_not(server: Running, encode: Encode) -> None:
    _shadow(server, "other")
    told = _compare(server, "other", encode)
    assert told["agreement"] < 0.9
    assert told["mean_difference"] > 0.05
    outcomes = {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(server.client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "trimrt_shadow_images_total"
    }
    assert outcomes["agreed"] + outcomes["disagreed"] == 10
    assert outcomes["agreed"] == pytest.approx(10 * told["agreement"])


def _sum(told: dict[str, Any]) -> int:
    return sum(told[fate] for fate in ("images", "dropped", "failed", "waiting"))


def test_every_image_is_compared_or_dropped_or_waits(server: Running, encode: Encode) -> None:
    _shadow(server, "same")
    files = [("file", encode(seed)) for seed in range(50)]
    for request in range(1, 5):
        assert server.client.post("/predict", files=files).status_code == 200
        assert _sum(_told(server, "same")) == 50 * request
    wait_until(lambda: _told(server, "same")["waiting"] == 0)
    told = _told(server, "same")
    assert told["images"] > 0
    assert told["dropped"] > 0
    assert _sum(told) == 200


def test_images_that_wait_hold_little_memory(
    server: Running, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = encode(1)
    monkeypatch.setattr("server.shadow._MOST_HELD", 3 * len(image))
    monkeypatch.setattr("server.shadow._PAUSE_S", 60)
    _shadow(server, "same")
    server.client.post("/predict", files=[("file", image)] * 10)
    wait_until(lambda: _sum(_told(server, "same")) == 10)
    told = _told(server, "same")
    assert (told["waiting"], told["dropped"]) == (3, 7)


def test_pixels_that_wait_do_not_hold_the_rest_of_their_body(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.shadow._PAUSE_S", 60)
    _shadow(server, "same")
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    tensor = {"name": "pixels", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.tolist()}
    assert server.client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code == 200
    waiting = server.service.registry.shadows["same"]._waiting
    wait_until(lambda: len(waiting) == 2)  # they are taken after the answer has gone out
    assert [it.image.base for it in waiting if isinstance(it.image, np.ndarray)] == [None, None]


def test_what_the_candidate_fails_on_is_no_agreement(server: Running, encode: Encode) -> None:
    _shadow(server, "fragile")
    _compare(server, "fragile", encode, images=1)
    white = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(white, "PNG")
    assert server.predict(white.getvalue()).status_code == 200
    wait_until(lambda: _told(server, "fragile")["failed"] == 1)
    assert _told(server, "fragile")["agreement"] == 0.5
    assert _sum(_told(server, "fragile")) == 2


def test_a_candidate_that_fails_on_every_batch_is_not_the_servers_failure(
    engines: Path, encode: Encode
) -> None:
    def fail(_pixels: np.ndarray, _alone: bool) -> None:
        raise EngineError("the device fell off")

    def load(folder: Path) -> Engine:
        return (load_wrapped(fail) if folder.name.startswith("same") else load_engine)(folder)

    settings = Settings(engine="tiny,same", engine_dir=engines, port=0, max_failed_batches=1)
    with running(settings, load) as it:
        _shadow(it, "same")
        assert it.predict(encode(1)).status_code == 200
        wait_until(lambda: _told(it, "same")["failed"] == 1)
        assert it.client.get("/health/ready").status_code == 200
        answer = it.client.post("/engines/same/promote", json={"images": 1, "agreement": 0})
        assert "failed on 1 batches in a row" in answer.json()["detail"]


def test_a_share_of_the_images_is_compared(server: Running, encode: Encode) -> None:
    _shadow(server, "same", share=0.5)
    for seed in range(60):
        server.predict(encode(seed))
    shadow = server.service.registry.shadows["same"]
    wait_until(lambda: not shadow._waiting and not shadow._running)
    assert 10 < shadow.counts.compared + shadow.counts.dropped < 50  # beyond which it is once in ten million


def test_images_of_other_engines_are_not_compared(server: Running, encode: Encode) -> None:
    _shadow(server, "same")
    server.predict(encode(1), params={"engine": "other"})
    assert _compare(server, "same", encode, images=1)["images"] == 1


def test_a_shadow_is_promoted_once_the_rule_holds(server: Running, encode: Encode) -> None:
    _shadow(server, "same")
    rule = {"images": 5, "agreement": 0.99, "p99_ms": 1000}
    refused = server.client.post("/engines/same/promote", json=rule)
    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:trimrt:problem:engine-not-proven"
    assert "0 images were compared, not 5" in refused.json()["detail"]
    _compare(server, "same", encode, images=5)
    assert server.client.post("/engines/same/promote", json=rule).status_code == 200
    assert server.predict(encode(1)).json()["engine"]["name"] == "same"
    assert _told(server, "same") is None
    assert server.service.telemetry.observers == []


def test_promotion_under_load_loses_no_answer(server: Running, encode: Encode) -> None:
    _shadow(server, "same")
    over = threading.Event()
    said: list[list[str]] = [[] for _ in range(4)]

    def ask(names: list[str]) -> None:
        while not over.is_set():
            answer = server.predict(encode(1))
            assert answer.status_code == 200
            names.append(answer.json()["engine"]["name"])

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask, names) for names in said]
        try:
            wait_until(lambda: _told(server, "same")["images"] > 0 and all(said))
            answer = server.client.post("/engines/same/promote", json={"images": 1})
            seen = list(map(len, said))
            wait_until(lambda: all(len(names) > then + 1 for names, then in zip(said, seen, strict=True)))
        finally:
            over.set()
        for client in clients:
            client.result()
    assert answer.status_code == 200
    for names in said:
        assert names[0] == "tiny"
        assert names[-1] == "same"
        assert names == sorted(names, reverse=True)  # from one to the other, once


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"images": 2}, "of the labels, not 98.00%"),
        ({"images": 2, "agreement": 0, "p99_ms": 1e-6}, "p99 of its"),
    ],
)
def test_what_does_not_hold_is_told(
    server: Running, encode: Encode, rule: dict[str, float], words: str
) -> None:
    _shadow(server, "other")
    _compare(server, "other", encode, images=10)
    assert words in server.client.post("/engines/other/promote", json=rule).json()["detail"]


def test_a_shadow_ends_with_either_engine(server: Running, encode: Encode) -> None:
    _shadow(server, "same")
    assert server.client.post("/engines/tiny/load").status_code == 200
    assert server.service.registry.shadows == {}
    _shadow(server, "same")
    assert server.client.post("/engines/same/unload").status_code == 200
    assert server.service.registry.shadows == {}
    assert server.service.telemetry.observers == []
    assert server.predict(encode(1)).status_code == 200


def test_a_shadow_can_be_ended(server: Running, encode: Encode) -> None:
    _shadow(server, "same")
    assert server.client.delete("/engines/same/shadow").status_code == 200
    assert server.client.delete("/engines/same/shadow").status_code == 404
    assert server.predict(encode(1)).status_code == 200


@pytest.mark.parametrize(
    ("name", "of", "status"),
    [("tiny", "tiny", 422), ("fewer", "tiny", 422), ("nobody", "tiny", 404), ("same", "nobody", 404)],
)
def test_engines_that_cannot_be_compared_are_refused(
    server: Running, name: str, of: str, status: int
) -> None:
    assert _shadow(server, name, of).status_code == status


def test_several_workers_have_no_shadows(engines: Path) -> None:
    with running(Settings(engine="tiny,same", engine_dir=engines, port=0, workers=2)) as it:
        answer = _shadow(it, "same")
        assert answer.status_code == 501
        assert "one worker" in answer.json()["detail"]


def test_managing_shadows_needs_the_key(engines: Path) -> None:
    with running(Settings(engine="tiny,same", engine_dir=engines, port=0, api_key="secret")) as it:
        assert _shadow(it, "same").status_code == 401
        assert it.client.post("/engines/same/promote").status_code == 401
