"""The cache of answers: what is answered from it, what never is, what it tells, and how much it holds."""

from __future__ import annotations

import gc
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from carriers import Carrier, Grpc, carrier
from gated_engine import Gate, load_gated
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from running import Running, running, wait_until
from streaming import stream
from tiny_engine import SIDE, write_package

from runtime.manifest import Manifest, read_manifest
from server.answers import AnswerCache
from server.jobs import Result
from server.settings import Settings

Encode = Callable[..., bytes]
Start = Callable[..., Carrier]

MIB = 1 << 20


@pytest.fixture
def start(
    kind: type[Carrier], engine_dir: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> Iterator[Start]:
    """A server with a cache, and a client of `kind`."""
    caplog.set_level(logging.INFO, "trimrt.grpc")
    with ExitStack() as stack:

        def start(**chosen: object) -> Carrier:
            options = {"engine": "tiny,other", "engine_dir": engine_dir, "port": 0, "cache_mib": 1, **chosen}
            configured = Settings(**options, grpc_port=0 if kind is Grpc else None)
            server = stack.enter_context(running(configured, load_gated(gate)))
            ports = [int(log.grpc.rpartition(":")[2]) for log in caplog.records if hasattr(log, "grpc")]
            it = stack.enter_context(carrier(kind, server, *ports or [0]))
            stack.callback(gate.open)
            return it

        yield start


@pytest.fixture
def server(engine_dir: Path) -> Iterator[Running]:
    with running(Settings(engine="tiny,other", engine_dir=engine_dir, port=0, cache_mib=1)) as it:
        yield it


def counted(server: Running, engine: str = "tiny") -> tuple[int, int]:
    """Hits and misses, by `/stats`."""
    (of,) = (it for it in server.client.get("/stats").json()["engines"] if it["engine"] == engine)
    return of["cache"]["hits"], of["cache"]["misses"]


def computed(server: Running) -> int:
    return sum(sum(stats.batches.values()) for stats in server.service.telemetry.engines.values())


# --- what is answered from it ---------------------------------------------------------------------------


def test_an_image_that_is_sent_again_is_answered_without_the_engine(
    start: Start, gate: Gate, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    it = start()
    first = it.ask(encode(0))
    gate.close()
    again = it.ask(encode(0))
    assert list(again.best) == list(first.best) == [reference(encode(0)).argmax()]
    assert counted(it.server) == (1, 1)
    assert gate.batches == []
    wait_until(lambda: it.counted("ok", "") == 2)


def test_only_the_images_that_are_new_are_computed(
    start: Start, gate: Gate, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    it = start()
    it.ask(encode(0), encode(2))
    images = [encode(seed) for seed in range(5)]
    answer = it.ask(*images)
    assert list(answer.best) == [reference(image).argmax() for image in images]
    assert counted(it.server) == (2, 2 + 3)


def test_what_is_found_takes_no_place_in_a_full_queue(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(queue_limit=1)
    it.ask(encode(0))
    gate.close()
    ahead = it.send(encode(1))
    gate.wait_for_arrivals(1)
    assert it.ask(encode(2)).error == it.error("queue-full")
    assert it.ask(encode(0)).error == ""
    gate.open()
    assert ahead.answer().error == ""


def test_what_is_found_is_for_those_alone_who_send_the_key(start: Start, encode: Encode) -> None:
    it = start(api_key=SecretStr("key"), protect_predict=True)
    it.ask(encode(0), X_API_Key="key")
    assert it.ask(encode(0), X_API_Key="other").error == it.error("unauthorized")
    assert it.ask(encode(0), X_API_Key="key").error == ""


def test_a_large_image_is_found_too(start: Start, gate: Gate, encode: Encode) -> None:
    it = start()
    large = encode(0, "BMP", (800, 700))
    assert len(large) > MIB
    first = it.ask(large, large)
    gate.close()
    assert list(it.ask(large).best) == [first.best[0]]
    assert counted(it.server) == (1, 2)


def test_a_frame_of_a_stream_is_found(server: Running, encode: Encode) -> None:
    server.predict(encode(0))
    with stream(server) as live:
        (result,) = live.ask(encode(0))["results"]
    assert result["cached"] is True
    assert counted(server) == (1, 1)


def test_what_one_protocol_computed_another_finds(
    start: Start, gate: Gate, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    it = start()
    it.server.predict(encode(0))
    gate.close()
    assert list(it.ask(encode(0)).best) == [reference(encode(0)).argmax()]


# --- what never is --------------------------------------------------------------------------------------


def test_without_the_setting_every_image_is_computed(engine_dir: Path, encode: Encode) -> None:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as it:
        answers = [it.predict(encode(0)).json()["results"][0] for _ in range(2)]
        assert [answer["cached"] for answer in answers] == [False, False]
        assert (computed(it), counted(it), it.client.get("/stats").json()["cache"]) == (2, (0, 0), None)
        assert "trimrt_cache" not in it.client.get("/metrics").text


def test_another_engine_answers_for_itself(
    server: Running, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    image = encode(0)
    for engine, folder in (("tiny", "tiny-v1"), ("other", "other-v1")):
        (result,) = server.predict(image, params={"engine": engine}).json()["results"]
        assert result["cached"] is False
        assert result["predictions"][0]["probability"] == pytest.approx(reference(image, folder).max())


@pytest.mark.parametrize("version", ["2", "1"], ids=["a new version", "the same version, built again"])
def test_a_package_that_is_loaded_anew_never_gives_the_old_ones_answer(
    tmp_path: Path, encode: Encode, version: str
) -> None:
    old = write_package(tmp_path / "engines", seed=0)
    write_package(tmp_path / "new", version=version, seed=1)
    with running(Settings(engine="tiny", engine_dir=tmp_path / "engines", port=0, cache_mib=1)) as it:
        before = it.predict(encode(0)).json()["results"][0]["predictions"]
        old.rename(tmp_path / "old")
        (tmp_path / f"new/tiny-v{version}").rename(tmp_path / f"engines/tiny-v{version}")
        assert it.client.post("/engines/tiny/load").status_code == 200
        (result,) = it.predict(encode(0)).json()["results"]
    assert result["cached"] is False
    assert result["predictions"] != before


def test_the_same_package_loaded_again_gives_the_answer_that_is_kept(server: Running, encode: Encode) -> None:
    before = server.predict(encode(0)).json()["results"][0]["predictions"]
    assert server.client.post("/engines/tiny/load").status_code == 200
    (result,) = server.predict(encode(0)).json()["results"]
    assert (result["cached"], result["predictions"]) == (True, before)


def test_an_image_that_was_refused_is_refused_again(server: Running, encode: Encode) -> None:
    for image in (b"broken", encode(0)[:-40]):
        problems = [server.predict(image).json() for _ in range(2)]
        assert problems[0]["type"] == problems[1]["type"] == "urn:trimrt:problem:image-damaged"
    assert counted(server) == (0, 4)
    assert server.client.get("/stats").json()["cache"]["answers"] == 0


def test_an_answer_of_too_few_classes_is_computed_again(server: Running, encode: Encode) -> None:
    def ask(top_k: int) -> dict[str, Any]:
        (result,) = server.predict(encode(0), params={"top_k": top_k}).json()["results"]
        assert len(result["predictions"]) == top_k
        return result

    assert [ask(top_k)["cached"] for top_k in (2, 5, 1, 5, 2)] == [False, False, True, True, True]


def test_a_damaged_image_among_images_that_are_found_is_told_by_its_number(
    server: Running, encode: Encode
) -> None:
    server.predict(encode(0))
    files = [("file", encode(0)), ("file", b"broken"), ("file", encode(0))]
    problem = server.client.post("/predict", files=files).json()
    assert (problem["type"], problem["image"]) == ("urn:trimrt:problem:image-damaged", 1)


# --- what is told ---------------------------------------------------------------------------------------


def test_an_answer_says_which_images_it_found(server: Running, encode: Encode) -> None:
    server.predict(encode(0))
    results = server.client.post("/predict", files=[("file", encode(1)), ("file", encode(0))]).json()[
        "results"
    ]
    assert [(it["cached"], it["batch_size"]) for it in results] == [(False, 1), (True, 0)]
    assert results[1]["latency_ms"] == {"decode": 0, "queue": 0, "inference": 0, "total": 0}


def test_the_open_inference_protocol_says_how_many_it_found(server: Running) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)

    def ask(images: np.ndarray) -> dict[str, Any]:
        data, shape = images.ravel().tolist(), list(images.shape)
        tensor = {"name": "pixels", "shape": shape, "datatype": "UINT8", "data": data}
        return server.client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).json()

    first, again, more = ask(pixels[:2]), ask(pixels[:2]), ask(pixels)
    assert "parameters" not in first
    assert again["parameters"] == more["parameters"] == {"cached_images": 2}
    assert again["outputs"] == first["outputs"]


def test_metrics_and_statistics_count_hits_misses_and_bytes(server: Running, encode: Encode) -> None:
    for seed in (0, 1, 0, 0):
        server.predict(encode(seed))
    told = server.client.get("/stats").json()
    assert counted(server) == (2, 2)
    assert told["cache"]["answers"] == 2
    assert 0 < told["cache"]["bytes"] < told["cache"]["limit"] == MIB
    metrics = server.client.get("/metrics").text
    for outcome in ("hit", "miss"):
        (line,) = (
            it for it in metrics.splitlines() if 'engine="tiny"' in it and f'outcome="{outcome}"' in it
        )
        assert line.startswith("trimrt_cache_images_total{")
        assert line.endswith(" 2.0")
    assert f"trimrt_cache_limit_bytes {MIB:e}" in metrics
    (stats,) = server.client.get("/v2/models/tiny/stats").json()["model_stats"]
    found, missed = (stats["inference_stats"][it]["count"] for it in ("cache_hit", "cache_miss"))
    assert (found, missed, stats["inference_count"]) == (2, 2, 2)


def test_predictions_count_what_was_found(server: Running, encode: Encode) -> None:
    for _ in range(3):
        server.predict(encode(0))
    (tiny, _) = server.client.get("/stats").json()["engines"]
    assert (tiny["predictions"]["images"], tiny["since_start"]["images"]) == (3, 1)


def test_a_shadow_compares_an_image_once(server: Running, encode: Encode) -> None:
    assert server.client.put("/engines/other/shadow", json={"of": "tiny", "share": 1}).status_code == 200
    for seed in (0, 0, 0, 1):
        server.predict(encode(seed))
    shadow = server.service.registry.shadow("other")
    wait_until(lambda: shadow.counts.compared == 2)
    assert not shadow._waiting


# --- how much it holds ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(engine_dir: Path) -> Manifest:
    return read_manifest(engine_dir / "tiny-v1")


def _result(number: int, classes: int = 10, top: int = 5) -> Result:
    scores = np.full(classes, number, np.float32)
    return Result(scores, scores, np.arange(top), 1, *[0.0] * 6, {})


images = st.one_of(
    st.binary(max_size=3), st.binary(min_size=3, max_size=3).map(lambda it: np.frombuffer(it, np.uint8))
)


@given(st.lists(st.tuples(images, st.booleans(), st.integers(0, 400), st.integers(0, 5)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_it_is_like_a_mapping_that_forgets_and_never_holds_more_than_it_may(
    manifest: Manifest, steps: list[tuple[bytes | np.ndarray, bool, int, int]]
) -> None:
    cache = AnswerCache(8000)
    engines = cache.of(manifest), cache.of(manifest.model_copy(update={"version": "2"}))
    model: dict[tuple[object, ...], tuple[int, int]] = {}
    for number, (image, newer, classes, top) in enumerate(steps):
        answers = engines[newer]
        (key,) = answers.keys([image])
        known = model.get((newer, type(image), bytes(image)))
        for wanted in range(6):
            found = answers.find(key, wanted)
            assert found is None or known is not None
            if found is not None and known is not None:
                assert (found.probabilities == known[0]).all()
                assert wanted <= len(found.order) == known[1]
                assert found.cached
        answers.keep(key, _result(number, classes, top))
        model[newer, type(image), bytes(image)] = number, top
        kept = answers.find(key, top)
        assert (kept is not None) == (1200 + 8 * classes + 8 * top <= 8000)
        assert cache.held.bytes <= cache.held.limit


def test_the_answer_that_was_used_least_recently_goes_first(manifest: Manifest) -> None:
    cache = AnswerCache(3 * (1200 + 80 + 40))
    answers = cache.of(manifest)
    keys = answers.keys([b"a", b"b", b"c", b"d"])
    for number, key in enumerate(keys[:3]):
        answers.keep(key, _result(number))
    assert answers.find(keys[0], 5) is not None
    answers.keep(keys[3], _result(3))
    assert [answers.find(key, 5) is not None for key in keys] == [True, False, True, True]


@pytest.mark.parametrize(("classes", "top"), [(2, 2), (10, 5), (1000, 5), (20_000, 1)])
def test_its_memory_is_what_it_says(manifest: Manifest, classes: int, top: int) -> None:
    cache = AnswerCache(2 * MIB)
    answers = cache.of(manifest)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    number = 0
    while cache.held.bytes < 1.9 * MIB:
        (key,) = answers.keys([number.to_bytes(4, "big")])
        answers.keep(key, _result(number, classes, top))
        number += 1
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before <= cache.held.bytes


def test_of_an_image_nothing_but_a_hash_is_kept(server: Running, encode: Encode) -> None:
    image = encode(0, "BMP", (300, 300))
    server.predict(image)
    assert server.client.get("/stats").json()["cache"]["bytes"] < 2000
