"""Five times more than the engine can do, for half a minute, whether or not it keeps up."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import TRIMRT
from running import running
from tiny_engine import write_package
from wrapped_engine import load_wrapped

from server.settings import Settings

pytestmark = pytest.mark.slow

SECONDS_PER_BATCH = 0.05
MAX_BATCH = 2
CAPACITY = MAX_BATCH / SECONDS_PER_BATCH  # images a second
QUEUE_LIMIT = 20


def test_overload_is_shed_and_survived(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    engines, image, result = tmp_path / "engines", tmp_path / "image.png", tmp_path / "result.json"
    write_package(engines, max_batch=MAX_BATCH)
    image.write_bytes(encode(1))
    settings = Settings(engine_dir=engines, port=0, queue_limit=QUEUE_LIMIT)
    slow = load_wrapped(lambda _pixels, _alone: time.sleep(SECONDS_PER_BATCH))  # a device of known capacity
    with running(settings, slow) as server:
        usual = server.predict(image.read_bytes()).elapsed.total_seconds()
        command = [TRIMRT, "loadtest", "--url", server.url, "--images", str(image), "--scenario", "server"]
        load = ["--load", str(5 * CAPACITY), "--warmup", "3", "--duration", "30", "--json", str(result)]
        process = subprocess.Popen([*command, *load], stdout=subprocess.DEVNULL)
        resident = []
        began = time.monotonic()
        while process.poll() is None:
            if time.monotonic() > began + 6:  # warm
                resident.append(psutil.Process().memory_info().rss)
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                assert server.client.get("/health/live").status_code == 200
        ended = time.monotonic()
        assert process.returncode == 0
        answer = server.predict(image.read_bytes())
        assert answer.status_code == 200
        assert time.monotonic() - ended < 2, "not back to normal"
        assert answer.elapsed.total_seconds() < max(5 * usual, 0.1)
    (point,) = json.loads(result.read_text())["points"]
    service_ms = 1000 / point["requests_per_s"]
    bound = 1.2 * QUEUE_LIMIT * service_ms
    growth = max(resident) / resident[0] - 1
    print(
        f"{point['requests']} sent, {point['answered']} answered ({point['requests_per_s']:.0f}/s of "
        f"{CAPACITY:.0f}), errors {point['errors']}, p99 {point['latency_ms']['p99']:.0f} ms of {bound:.0f}, "
        f"generator late by {point['send_lag_ms']:.0f} ms at p99, memory {growth:+.1%}"
    )
    assert set(point["errors"]) == {"429 queue-full"}
    assert point["latency_ms"]["p99"] <= bound
    assert point["requests_per_s"] >= 0.9 * CAPACITY, "shedding must not cost throughput"
    assert growth < 0.05
