"""How batches form, on a real engine behind a gate that the test holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gated_engine import Gate, load_gated
from running import Running, running, wait_until
from tiny_engine import write_package

from models.preprocessing import plan_loading
from server.backlog import Backlog
from server.settings import Settings

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]

QUEUE_LIMIT = 12


@pytest.fixture
def gated(engine_dir: Path, gate: Gate) -> Iterator[Running]:
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, queue_limit=QUEUE_LIMIT)
    with running(settings, load_gated(gate)) as it:
        gate.close()
        yield it
        gate.open()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(QUEUE_LIMIT) as it:
        yield it


def _pending(server: Running) -> int:
    return server.service.registry.get(None).pending


def _backlog(server: Running) -> Backlog:
    return server.service.registry.get(None)._backlog


def _send(pool: ThreadPoolExecutor, server: Running, images: list[bytes]) -> list[Future[httpx.Response]]:
    return [pool.submit(server.predict, image) for image in images]


def test_batches_form_only_while_the_engine_is_busy(
    gated: Running, gate: Gate, pool: ThreadPoolExecutor, encode: Encode
) -> None:
    first = _send(pool, gated, [encode(0)])
    gate.wait_for_arrivals(1)
    rest = _send(pool, gated, [encode(n) for n in range(1, 6)])
    wait_until(lambda: _backlog(gated).waiting == 5)
    gate.allow(2)
    sizes = [future.result().json()["results"][0]["batch_size"] for future in first + rest]
    assert sizes == [1, 5, 5, 5, 5, 5]
    assert gate.batches == [1, 5]


def test_a_large_request_is_split_over_batches_and_reassembled(
    gated: Running, gate: Gate, encode: Encode, reference: Callable[..., object]
) -> None:
    images = [encode(n) for n in range(QUEUE_LIMIT)]
    gate.open()
    answers = gated.client.post(
        "/predict", files=[("file", (f"{n}.png", i)) for n, i in enumerate(images)]
    ).json()
    for image, result in zip(images, answers["results"], strict=True):
        assert result["predictions"][0]["index"] == int(reference(image).argmax())
        assert result["batch_size"] <= 8


def test_health_answers_while_the_engine_is_busy(
    gated: Running, gate: Gate, pool: ThreadPoolExecutor, encode: Encode
) -> None:
    busy = _send(pool, gated, [encode(0)])
    gate.wait_for_arrivals(1)
    assert gated.client.get("/health/live").status_code == 200
    assert gated.client.get("/health/ready").status_code == 200
    gate.open()
    assert busy[0].result().status_code == 200


def test_a_delay_lets_a_batch_form_on_an_idle_engine(
    engine_dir: Path, pool: ThreadPoolExecutor, encode: Encode
) -> None:
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, max_batch_delay_ms=1000)
    with running(settings) as server:
        answers = [
            f.result().json()["results"][0] for f in _send(pool, server, [encode(n) for n in range(8)])
        ]
    assert [answer["batch_size"] for answer in answers] == [8] * 8


@pytest.fixture
def two_cores(engine_dir: Path, gate: Gate) -> Iterator[Running]:
    """An engine whose two slots compute, and decode, on the CPU."""
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0)
    with running(settings, load_gated(gate, slots=2, on_cpu=True)) as it:
        gate.close()
        yield it
        gate.open()


def test_cores_share_what_waits(
    two_cores: Running, gate: Gate, pool: ThreadPoolExecutor, encode: Encode
) -> None:
    """Each takes as many; half wait, so that whoever is done first has something to go on with."""
    wait_until(lambda: _backlog(two_cores).sleeping == 2)
    form = pool.submit(
        httpx.post,
        f"{two_cores.url}/predict",
        files=[("file", (f"{n}.png", encode(n), "image/png")) for n in range(16)],
    )
    gate.wait_for_arrivals(2)
    assert gate.batches == [4, 4]
    assert _backlog(two_cores).waiting == 8
    gate.open()
    sizes = [result["batch_size"] for result in form.result().json()["results"]]
    assert sizes[:8] == [4] * 8


def test_what_comes_while_a_batch_is_decoded_joins_it(
    engine_dir: Path, gate: Gate, pool: ThreadPoolExecutor, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, may_go_on = threading.Event(), threading.Event()

    def held(*arguments: Any, **options: Any) -> Any:
        decoding.set()
        assert may_go_on.wait(30)
        return plan_loading(*arguments, **options)

    monkeypatch.setattr("server.decoding.plan_loading", held)
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0)
    with running(settings, load_gated(gate, slots=1, on_cpu=True)) as server:
        futures = _send(pool, server, [encode(0)])
        assert decoding.wait(30)
        futures += _send(pool, server, [encode(n) for n in range(1, 6)])
        wait_until(lambda: server.service.registry.get(None).pending == 6)
        may_go_on.set()
        sizes = [future.result().json()["results"][0]["batch_size"] for future in futures]
    assert sizes[0] == 4
    assert sizes.count(4) == 4


def test_an_image_alone_may_use_every_core(
    two_cores: Running, gate: Gate, pool: ThreadPoolExecutor, encode: Encode
) -> None:
    wait_until(lambda: _backlog(two_cores).sleeping == 2)
    futures = _send(pool, two_cores, [encode(0)])
    gate.wait_for_arrivals(1)
    futures += _send(pool, two_cores, [encode(1)])
    gate.wait_for_arrivals(2)
    gate.open()
    assert [future.result().status_code for future in futures] == [200, 200]
    assert gate.alone == [True, False]


def test_a_damaged_image_leaves_the_others_of_its_batch_alone(
    two_cores: Running, gate: Gate, pool: ThreadPoolExecutor, encode: Encode, reference: Reference
) -> None:
    busy = _send(pool, two_cores, [encode(0), encode(1)])
    gate.wait_for_arrivals(2)
    images = [encode(2), encode(3)[:60], encode(4)]
    sent = _send(pool, two_cores, images)
    wait_until(lambda: _backlog(two_cores).waiting == 3)
    gate.open()
    good, damaged, other = (future.result() for future in sent)

    assert damaged.status_code == 400
    assert damaged.json()["type"] == "urn:trimrt:problem:image-damaged"
    for answer, image in ((good, images[0]), (other, images[2])):
        (result,) = answer.json()["results"]
        best = result["predictions"][0]
        assert best["index"] == reference(image).argmax()
        assert best["probability"] == pytest.approx(reference(image).max(), abs=1e-5)
    assert [future.result().status_code for future in busy] == [200, 200]
    assert _pending(two_cores) == 0


def test_an_engine_that_takes_no_fewer_images_gets_them(tmp_path: Path, encode: Encode) -> None:
    """The rest of its batch is whatever was there before."""
    probabilities = []
    for least in (1, 3):
        write_package(tmp_path / str(least), min_batch=least)
        settings = Settings(engine="tiny", engine_dir=tmp_path / str(least), port=0)
        with running(settings) as server:
            response = server.predict(encode(0))
        assert response.status_code == 200, response.text
        (result,) = response.json()["results"]
        assert result["batch_size"] == 1
        probabilities.append([entry["probability"] for entry in result["predictions"]])
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
