"""A server is at work only in its turns, and is named when it fails."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
from running import wait_until

import benchmarks.serving
from benchmarks.contenders import Contender, Form
from benchmarks.serving import ServerError, Serving, serving

ANSWERING = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # or the client waits 40 ms for the second packet

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = b'{"predictions": [{"label": "cat"}, {"label": "dog"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Tiny(Contender):
    def command(self, package: Path, port: int) -> list[str]:
        return [sys.executable, "-c", ANSWERING, str(port)]

    def variables(self, form: Form, package: Path, port: int) -> dict[str, str]:
        return dict(os.environ)


class Broken(Tiny):
    def command(self, package: Path, port: int) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit(1)"]


TINY = Tiny("tiny", "Tiny", "/")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmarks.serving, "BUILD", tmp_path)  # logs
    path = tmp_path / "0.jpg"
    path.write_bytes(b"image")
    return path


def stopped(server: Serving) -> bool:
    return {member.status() for member in server.tree.members()} == {psutil.STATUS_STOPPED}


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_servers_are_loaded_in_turns_while_the_other_is_stopped(file: Path, tmp_path: Path) -> None:
    with (
        serving(TINY, "usual", tmp_path, b"image") as first,
        serving(TINY, "trimrt", tmp_path, b"image") as second,
    ):
        for server in (first, second):
            server.tree.pause()
        for ours, theirs in ((first, second), (second, first)):
            others = theirs.tree.cpu_seconds()
            with ours.awake():
                done = ours.round([file], connections=2, seconds=1)
            assert done.requests > 10
            assert done.failed == 0
            assert done.cpu_seconds > 0
            assert theirs.tree.cpu_seconds() == others
            wait_until(partial(stopped, ours))


def test_a_server_that_does_not_start_is_named(file: Path, tmp_path: Path) -> None:
    broken = Broken("broken", "Broken", "/")

    with (
        serving(TINY, "usual", tmp_path, b"image") as server,
        pytest.raises(
            ServerError, match=r"^Broken \(usual\): it ended before it answered; see .*log$"
        ) as told,
        serving(broken, "usual", tmp_path, b"image"),
    ):
        pass

    assert told.value.contender is broken
    assert server.tree.ended()


def test_wrong_labels_and_no_answer_are_told(file: Path, tmp_path: Path) -> None:
    with serving(TINY, "usual", tmp_path, b"image") as server:
        server.check(file, ("cat", "dog"))
        with pytest.raises(
            ServerError, match=r"Tiny \(usual\): wrong labels for 0.jpg: cat, dog instead of dog"
        ):
            server.check(file, ("dog",))
    with pytest.raises(ServerError, match=r"Tiny \(usual\): no answer"):
        server.check(file, ("cat", "dog"))
