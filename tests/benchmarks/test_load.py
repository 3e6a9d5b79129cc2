"""`wrk` with our script, against a real HTTP server."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.answers import ask
from benchmarks.contenders import Contender
from benchmarks.load import Round, cpu_milliseconds, merge, run_wrk
from benchmarks.serving import free_port

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")

Recorder = tuple[int, set[tuple[str | None, bytes]]]

HEADERS = {"Content-Type": "image/jpeg"}


class _Recorder(BaseHTTPRequestHandler):
    """Answers with labels, and refuses what is posted to `/refuse`."""

    protocol_version = "HTTP/1.1"
    bodies: set[tuple[str | None, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.add((self.headers["Content-Type"], body))
        answer = b'{"predictions": [{"label": "cat"}, {"label":"dog"}]}'
        self.send_response(429 if self.path == "/refuse" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    handler = type("Recorder", (_Recorder,), {"bodies": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1], handler.bodies
        server.shutdown()
        thread.join()


@needs_wrk
def test_files_are_posted_in_turn(recorder: Recorder, tmp_path: Path) -> None:
    port, bodies = recorder
    files = [tmp_path / "0.jpg", tmp_path / "1.jpg"]
    for file, content in zip(files, (b"\xff\xd8 one", b"\x00 two"), strict=True):
        file.write_bytes(content)

    asked: list[float] = []

    def cpu_seconds() -> float:
        asked.append(time.monotonic())
        return 3.0 * len(asked)

    done = run_wrk(
        f"http://127.0.0.1:{port}/",
        files,
        connections=2,
        seconds=1,
        headers=HEADERS,
        cpu_seconds=cpu_seconds,
    )

    load = merge([done])
    before, after = asked
    assert after - before >= 1
    assert done.cpu_seconds == 3
    assert bodies == {("image/jpeg", b"\xff\xd8 one"), ("image/jpeg", b"\x00 two")}
    assert load.requests > 10
    assert (load.failed, load.refused) == (0, 0)
    assert load.throughput == pytest.approx(load.requests / load.seconds)
    assert sum(count for _, count in done.latencies) >= done.requests  # wrk adds some for a stall
    assert 0 < load.p50 <= load.p90 <= load.p99 <= load.longest


@needs_wrk
def test_files_are_posted_to_several_paths_in_turn(recorder: Recorder, tmp_path: Path) -> None:
    port, _ = recorder
    file = tmp_path / "0.jpg"
    file.write_bytes(b"one")

    url = f"http://127.0.0.1:{port}/elsewhere"
    done = run_wrk(url, [file], connections=1, seconds=1, headers=HEADERS, paths=["/", "/refuse"])

    assert done.requests > 10
    assert abs(2 * done.refused - done.requests) <= 1


@needs_wrk
def test_refusals_are_counted(recorder: Recorder, tmp_path: Path) -> None:
    port, _ = recorder
    file = tmp_path / "0.jpg"
    file.write_bytes(b"one")

    load = run_wrk(f"http://127.0.0.1:{port}/refuse", [file], connections=1, seconds=1, headers=HEADERS)

    assert load.refused == load.requests > 0
    assert load.throughput == 0


def test_labels_are_found_in_an_answer(recorder: Recorder) -> None:
    port, _ = recorder

    assert ask(Contender("recorder", "Recorder", "/"), port, b"image") == ("cat", "dog")


@needs_wrk
def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    file = tmp_path / "0.jpg"
    file.write_bytes(b"one")

    with pytest.raises(click.ClickException, match=r"wrk failed: .*unable to connect"):
        run_wrk(f"http://127.0.0.1:{free_port()}/", [file], connections=1, seconds=1, headers=HEADERS)


def round_of(latencies: list[int]) -> Round:
    """With requests of so many microseconds, one after the other on one connection."""
    return Round(
        requests=len(latencies),
        seconds=sum(latencies) / 1e6 or 1,
        latencies=list(Counter(latencies).items()),
        cpu_seconds=0.001 * len(latencies),
    )


@given(st.lists(st.lists(st.integers(1, 2000) | st.integers(1, 10), max_size=30), min_size=1, max_size=5))
def test_merged_rounds_are_as_one(rounds: list[list[int]]) -> None:
    load = merge([round_of(latencies) for latencies in rounds])

    together = [latency for latencies in rounds for latency in latencies]
    assert load.requests == len(together)
    if together:
        assert cpu_milliseconds([round_of(latencies) for latencies in rounds]) == pytest.approx(1)
        expected = np.percentile(together, [50, 90, 99, 100], method="inverted_cdf") / 1000
        assert [load.p50, load.p90, load.p99, load.longest] == pytest.approx(list(expected))
    else:
        assert load.p50 == load.longest == 0


def test_throughputs_of_rounds_count_by_their_length() -> None:
    short = Round(requests=10, seconds=1, refused=4, failed=1, latencies=[], cpu_seconds=0)
    long = Round(requests=30, seconds=2, latencies=[], cpu_seconds=0)

    load = merge([short, long])

    assert (load.throughput, load.refused, load.failed) == (12, 4, 1)
