"""Clients that send one image at a time, beside clients that send 64 in a form."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import TRIMRT, start_process
from tiny_engine import write_package

pytestmark = pytest.mark.slow

IMAGES = 64
PER_SECOND = 100


def test_singles_are_neither_refused_nor_made_to_wait_by_large_requests(
    tmp_path: Path, encode: Callable[..., bytes]
) -> None:
    write_package(tmp_path / "engines", max_batch=32)
    (tmp_path / "image.png").write_bytes(encode(1))
    form = httpx.Request("POST", "http://x", files=[("file", ("x.png", encode(1)))] * IMAGES)
    body, headers = form.read(), {"Content-Type": form.headers["Content-Type"]}
    over = threading.Event()
    with start_process(["--engine-dir", str(tmp_path / "engines")], tmp_path / "log") as server:

        def send_forms() -> Counter[int]:
            answers: Counter[int] = Counter()
            with httpx.Client(timeout=30) as client:
                while not over.is_set():
                    answer = client.post(f"{server.url}/predict", content=body, headers=headers)
                    answers[answer.status_code] += 1
            return answers

        def singles() -> dict[str, Any]:
            result = tmp_path / "result.json"
            command = [TRIMRT, "loadtest", "--url", server.url, "--images", str(tmp_path / "image.png")]
            load = ["--scenario", "server", "--load", str(PER_SECOND), "--warmup", "2", "--duration", "8"]
            options = [*command, *load, "--json", str(result)]
            subprocess.run(options, check=True, stdout=subprocess.DEVNULL)
            return json.loads(result.read_text())["points"][0]  # type: ignore[no-any-return]

        alone = singles()
        with ThreadPoolExecutor(2) as pool:
            clients = [pool.submit(send_forms) for _ in range(2)]
            try:
                beside = singles()
            finally:
                over.set()
            forms = sum((client.result() for client in clients), Counter[int]())
    p99 = [point["latency_ms"]["p99"] for point in (alone, beside)]
    print(
        f"p99 of singles: {p99[0]:.1f} ms alone, {p99[1]:.1f} ms beside forms; forms answered {dict(forms)}"
    )
    assert beside["errors"] == alone["errors"] == {}
    assert forms[200] > 0
    assert p99[1] <= 2 * p99[0]
