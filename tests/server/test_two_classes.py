"""An engine of two classes, fewer than the labels that are usually given: every way to ask it answers."""

from __future__ import annotations

import io
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image
from running import Running, running
from tiny_engine import SIDE, write_package

from server.settings import Settings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("engines")
    write_package(folder, classes=2)
    with running(Settings(engine_dir=folder, port=0)) as started:
        yield started


def picture() -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return pixels, buffer.getvalue()


def test_both_labels_are_the_default(server: Running) -> None:
    (result,) = server.predict(picture()[1]).json()["results"]
    assert {prediction["label"] for prediction in result["predictions"]} == {"red", "green"}
    assert sum(prediction["probability"] for prediction in result["predictions"]) == pytest.approx(
        1, abs=1e-5
    )


def test_more_than_there_are_is_refused_with_their_number(server: Running) -> None:
    response = server.predict(picture()[1], params={"top_k": 3})
    assert response.status_code == 422
    assert "from 1 to 2" in response.json()["detail"]


def test_the_open_inference_protocol_gives_two_logits(server: Running) -> None:
    pixels, image = picture()
    tensor = {
        "name": "pixels",
        "shape": [1, SIDE, SIDE, 3],
        "datatype": "UINT8",
        "data": pixels.ravel().tolist(),
    }
    answer = httpx.post(f"{server.url}/v2/models/tiny/infer", json={"inputs": [tensor]}).json()
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["probabilities"]["shape"] == [1, 2]
    (result,) = server.predict(image).json()["results"]
    by_index = {each["index"]: each["probability"] for each in result["predictions"]}
    assert outputs["probabilities"]["data"] == pytest.approx([by_index[0], by_index[1]], abs=1e-6)
