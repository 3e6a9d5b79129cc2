"""An engine whose logits are NaN or infinite has failed: nobody gets them as an answer."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from carriers import CARRIERS, Carrier, carrier
from gated_engine import Gate, load_gated
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from running import Running, running, wait_until
from tiny_engine import write_graph_that_fails_on_white, write_package

from server.settings import Settings


def plain(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


FINE, WHITE = plain(100), plain(255)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines")
    write_package(directory, write_graph=write_graph_that_fails_on_white)
    return directory


@pytest.fixture(params=CARRIERS.values(), ids=CARRIERS)
def it(
    request: pytest.FixtureRequest, directory: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> Iterator[Carrier]:
    caplog.set_level(logging.INFO, "trimrt.grpc")
    settings = Settings(engine="tiny", engine_dir=directory, port=0, grpc_port=0)
    with running(settings, load_gated(gate)) as server:
        (port,) = [int(log.grpc.rpartition(":")[2]) for log in caplog.records if hasattr(log, "grpc")]
        with carrier(request.param, server, port) as it:
            yield it


def images_failed(server: Running) -> float:
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    (family,) = (family for family in families if family.name == "trimrt_images_failed")
    return sum(sample.value for sample in family.samples)


def test_the_engine_has_failed_whoever_asks(it: Carrier) -> None:
    failed = it.ask(WHITE)
    assert failed.error == it.error("inference-failed")
    assert "NaN or infinite logits" in failed.detail
    wait_until(lambda: it.counted("failed", "inference-failed") == 1)
    assert images_failed(it.server) == 1
    assert it.ask(FINE).error == "", "the next request is answered"


def test_it_fails_its_request_and_no_other_of_its_batch(it: Carrier, gate: Gate) -> None:
    gate.close()
    first = it.send(FINE)
    gate.wait_for_arrivals(1)
    batch = [it.send(image) for image in (FINE, WHITE) * 4]
    wait_until(lambda: it.server.service.registry.get(None).pending == 9)
    gate.allow(9)
    assert first.answer().error == ""
    assert [sent.answer().error for sent in batch] == ["", it.error("inference-failed")] * 4
    assert sum(gate.batches) == 9
    assert max(gate.batches) > 1


def test_one_such_image_fails_a_request_of_several(it: Carrier) -> None:
    assert it.ask(FINE, WHITE, FINE).error == it.error("inference-failed")
    assert it.ask(FINE, FINE).error == ""


def test_the_problem_names_the_image(directory: Path) -> None:
    with running(Settings(engine="tiny", engine_dir=directory, port=0)) as server:
        files = [("file", image) for image in (FINE, FINE, WHITE)]
        problem = server.client.post("/predict", files=files)
        assert problem.status_code == 500
        assert problem.json()["image"] == 2
        assert server.client.get("/stats").json()["engines"][0]["failed"] == 1
