"""No answer to a request is another's, however they are batched and whatever changes meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from running import Running, running
from tiny_engine import LABELS

from server.settings import Settings

pytestmark = pytest.mark.slow

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]


def _ask(server: Running, image: bytes) -> tuple[str, np.ndarray, int]:
    response = server.predict(image, params={"top_k": len(LABELS)})
    assert response.status_code == 200, response.text
    answer = response.json()
    (result,) = answer["results"]
    probabilities = np.zeros(len(LABELS), np.float32)
    for prediction in result["predictions"]:
        probabilities[prediction["index"]] = prediction["probability"]
    return answer["engine"]["name"], probabilities, result["batch_size"]


def test_2048_distinct_images_at_concurrency_64(
    engine_dir: Path, encode: Encode, reference: Reference
) -> None:
    images = [encode(seed) for seed in range(2048)]
    expected = np.stack([reference(image) for image in images])
    apart = np.abs(expected[:, None] - expected[None]).max(2) + np.eye(len(images))
    assert apart.min() > 1e-4, "two images look alike, so a mix-up would not be seen"
    with (
        running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as server,
        ThreadPoolExecutor(64) as pool,
    ):
        answers = list(pool.map(lambda image: _ask(server, image), images))
    sizes = np.array([size for _, _, size in answers])
    print(f"batch sizes: mean {sizes.mean():.1f}, largest {sizes.max()}")
    assert sizes.max() > 1
    np.testing.assert_allclose(
        np.stack([probabilities for _, probabilities, _ in answers]), expected, atol=1e-5
    )


def test_thousands_of_requests_while_engines_switch_reload_and_unload(
    engine_dir: Path, tmp_path: Path, encode: Encode, reference: Reference
) -> None:
    directory = Path(shutil.copytree(engine_dir, tmp_path / "engines"))
    images = [encode(seed) for seed in range(100)]
    expected = {name: [reference(image, f"{name}-v1") for image in images] for name in ("tiny", "other")}
    with running(Settings(engine="tiny,other", engine_dir=directory, port=0)) as server:
        enough = threading.Event()

        def ask(number: int) -> Counter[str]:
            asked = Counter[str]()
            while not enough.is_set() or asked.total() < 150:
                name, probabilities, _ = _ask(server, images[number % 100])
                np.testing.assert_allclose(probabilities, expected[name][number % 100], atol=1e-5)
                asked[name] += 1
                number += 1
            return asked

        with ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(ask, number) for number in range(16)]
            try:
                for default, rest in (("other", "tiny"), ("tiny", "other")) * 4:
                    for method, path, body in [
                        ("PUT", "/engines/default", {"name": default}),
                        ("POST", f"/engines/{rest}/unload", None),
                        ("POST", f"/engines/{default}/load", None),
                        ("POST", f"/engines/{rest}/load", None),
                    ]:
                        assert server.client.request(method, path, json=body).status_code == 200
            finally:
                enough.set()
            asked = sum((client.result() for client in clients), Counter[str]())
    print(f"8 rounds of switch, unload and two reloads; answered by {dict(asked)}")
    assert asked.total() >= 2400
    assert asked["tiny"] > 0 < asked["other"]
