"""`wrk` with our script, against a real HTTP server."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.answers import ask
from benchmarks.load import run_wrk

pytestmark = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")

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


def test_files_are_posted_in_turn(recorder: Recorder, tmp_path: Path) -> None:
    port, bodies = recorder
    files = [tmp_path / "0.jpg", tmp_path / "1.jpg"]
    for file, content in zip(files, (b"\xff\xd8 one", b"\x00 two"), strict=True):
        file.write_bytes(content)

    load = run_wrk(f"http://127.0.0.1:{port}/", files, connections=2, seconds=1, headers=HEADERS)

    assert bodies == {("image/jpeg", b"\xff\xd8 one"), ("image/jpeg", b"\x00 two")}
    assert load.requests > 10
    assert (load.failed, load.refused) == (0, 0)
    assert load.throughput == pytest.approx(load.requests / load.seconds)
    assert 0 < load.p50 <= load.p90 <= load.p99 <= load.longest


def test_refusals_are_counted(recorder: Recorder, tmp_path: Path) -> None:
    port, _ = recorder
    file = tmp_path / "0.jpg"
    file.write_bytes(b"one")

    load = run_wrk(f"http://127.0.0.1:{port}/refuse", [file], connections=1, seconds=1, headers=HEADERS)

    assert load.refused == load.requests > 0
    assert load.throughput == 0


def test_labels_are_found_in_an_answer(recorder: Recorder) -> None:
    port, _ = recorder

    assert ask(port, "/", HEADERS, b"image") == ("cat", "dog")
