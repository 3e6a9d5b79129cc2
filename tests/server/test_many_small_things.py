"""Requests of a permitted size that hold very many small things: nobody else notices them."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from processes import Started, start_process

STALL_S = 1.0  # the bar is 50 ms, on a machine that does nothing else; without limits these take seconds
TURN_S = 0.3  # the same for what one connection sends, which was parsed as it came
MEMORY_MIB = 300

FORM = "multipart/form-data; boundary=b"
JSON = "application/json"
BINARY = "application/octet-stream"


@pytest.fixture(scope="module")
def process(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny"]
    with start_process(options, tmp_path_factory.mktemp("small") / "log") as started:
        yield started
        assert "Traceback" not in started.log.read_text()


class Prober(threading.Thread):
    """Another client, that asks whether the server lives, again and again."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.slowest = 0.0
        self._url = url
        self._stopped = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._url) as client:
            while not self._stopped.is_set():
                began = time.monotonic()
                assert client.get("/health/live", timeout=30).status_code == 200
                self.slowest = max(self.slowest, time.monotonic() - began)

    def __enter__(self) -> Prober:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def _part(name: str, data: bytes = b"", headers: bytes = b"") -> bytes:
    disposition = b'Content-Disposition: form-data; name="%b"\r\n' % name.encode()
    return b"--b\r\n" + disposition + headers + b"\r\n" + data + b"\r\n"


def _json(
    data: bytes = b"[0]", datatype: bytes = b"UINT8", shape: bytes = b"[1]", more: bytes = b""
) -> bytes:
    head = b'{"inputs":[{"name":"pixels","datatype":"%b","shape":%b,"data":' % (datatype, shape)
    return head + data + b"}]" + more + b"}"


def _list(element: bytes, count: int) -> bytes:
    return b"[" + b",".join([element] * count) + b"]"


def _binary(size: int) -> tuple[bytes, int]:
    tensor = {"name": "pixels", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + bytes(size), len(head)


MANY = {
    "parts of a form": (FORM, lambda: _part("file") * 500_000 + b"--b--\r\n", 413),
    "fields of a form": (FORM, lambda: _part("x") * 500_000 + b"--b--\r\n", 413),
    "parts without headers": (FORM, lambda: b"--b\r\n\r\n\r\n" * 3_000_000 + b"--b--\r\n", 413),
    "headers of a part": (FORM, lambda: _part("file", headers=b"A: b\r\n" * 4_000_000) + b"--b--\r\n", 400),
    "parameters of a header": (
        FORM,
        lambda: _part('x"' + '; a="b"' * 400) * 100 + _part("file") + b"--b--\r\n",
        400,
    ),
    "almost boundaries": (FORM, lambda: _part("file", b"\r\n--a" * 5_000_000) + b"--b--\r\n", 400),
    "line ends": (FORM, lambda: _part("file", b"\r\n" * 15_000_000) + b"--b--\r\n", 400),
    "inputs in JSON": (
        JSON,
        lambda: b'{"inputs":' + _list(b'{"name":"a","datatype":"x","shape":[],"data":[]}', 600_000) + b"}",
        413,
    ),
    "outputs in JSON": (JSON, lambda: _json(more=b',"outputs":' + _list(b'{"name":"logits"}', 200_000)), 413),
    "empty strings": (JSON, lambda: _json(_list(b'""', 2_000_000)), 413),
    "empty strings and a long one": (
        JSON,
        lambda: _json(b'["' + b"x" * 1000 + b'",' + _list(b'""', 500_000)[1:]),
        400,
    ),
    "empty elements": (JSON, lambda: _json(_list(b'""', 500_000), b"BYTES"), 413),
    "numbers": (JSON, lambda: _json(_list(b"1", 16_000_000)), 413),
    "numbers, all that JSON may have": (JSON, lambda: _json(_list(b"255", 520_000)), 422),
    "lists": (JSON, lambda: _json(_list(b"[]", 10_000_000)), 413),
    "lists, all that JSON may have": (JSON, lambda: _json(_list(b"[1,2,3]", 130_000)), 422),
    "objects": (JSON, lambda: _json(_list(b"{}", 10_000_000)), 413),
    "keys": (
        JSON,
        lambda: _json(b"[{" + b",".join(b'"%d":0' % number for number in range(500_000)) + b"}]"),
        413,
    ),
    "dimensions": (JSON, lambda: _json(shape=_list(b"1", 500_000)), 400),
    "dimensions that are none": (JSON, lambda: _json(shape=_list(b'""', 500_000)), 400),
    "characters of base64": (
        JSON,
        lambda: _json(b'["' + base64.b64encode(bytes(6_000_000)) + b'"]', b"BYTES"),
        400,
    ),
    "escapes": (JSON, lambda: _json(b'["' + b"\\u00e9" * 1_300_000 + b'"]', b"BYTES"), 400),
    "empty binary elements": (BINARY, lambda: _binary(31 << 20), 413),
}


@pytest.mark.parametrize("what", MANY)
def test_very_many(what: str, process: Started) -> None:
    content_type, body, status = MANY[what]
    headers = {"Content-Type": content_type}
    content = body()
    if isinstance(content, tuple):
        content, length = content
        headers["Inference-Header-Content-Length"] = str(length)
    path = "/predict" if content_type == FORM else "/v2/models/tiny/infer"
    before = process.resident_mib()
    with Prober(process.url) as prober:
        answer = httpx.post(process.url + path, content=content, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 2_000
    print(f"/health/live took up to {1e3 * prober.slowest:.0f} ms")
    assert prober.slowest < STALL_S
    assert process.resident_mib() - before < MEMORY_MIB


_TO_NO_ENGINE = b"POST /predict?engine=none HTTP/1.1\r\nHost: x\r\n"
FLOODS = {
    "requests, each answered at once": (_TO_NO_ENGINE + b"\r\n") * 40_000,
    "chunks of a body that is not wanted": _TO_NO_ENGINE
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"1\r\nx\r\n" * 3_000_000
    + b"0\r\n\r\n",
}


@pytest.mark.parametrize("what", FLOODS)
def test_others_have_their_turn_while_one_connection_sends_very_many(what: str, process: Started) -> None:
    url = httpx.URL(process.url)
    ended = threading.Event()

    def drain(client: socket.socket) -> None:
        while client.recv(1 << 20):
            pass
        ended.set()

    with socket.create_connection((url.host, url.port), timeout=60) as client, Prober(process.url) as prober:
        reader = threading.Thread(target=drain, args=(client,))
        reader.start()
        client.sendall(FLOODS[what] + b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        reader.join()
    assert ended.is_set()
    print(f"/health/live took up to {1e3 * prober.slowest:.0f} ms")
    assert prober.slowest < TURN_S
