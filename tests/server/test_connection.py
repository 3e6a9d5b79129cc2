"""`POST /predict` on the wire: its short way through the server, and that the long one answers alike."""

from __future__ import annotations

import gc
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gated_engine import Gate, load_gated
from running import Running, running, wait_until
from wire import Wire, head

from server.admission import Admission, Call
from server.settings import Settings

Encode = Callable[..., bytes]


@pytest.fixture
def wire(server: Running) -> Iterator[Wire]:
    it = Wire(server)
    with it.socket:
        yield it


def _best(answer: dict[str, Any]) -> int:
    index: int = answer["results"][0]["predictions"][0]["index"]
    return index


def test_a_body_may_come_in_any_pieces(wire: Wire, encode: Encode, reference: Any) -> None:
    image = encode(1)
    request = head(len(image)) + image
    for size in (1, 7, 50, len(request)):
        wire.send(*(request[at : at + size] for at in range(0, len(request), size)))
        status, _, answer = wire.answer()
        assert (status, _best(answer)) == (200, reference(image).argmax())


def test_a_body_may_come_in_chunks(wire: Wire, encode: Encode, reference: Any) -> None:
    image = encode(2)
    wire.send(head("chunked", "Transfer-Encoding: chunked"))
    for at in range(0, len(image), 40):
        piece = image[at : at + 40]
        wire.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    wire.send(b"0\r\n\r\n")
    status, _, answer = wire.answer()
    assert (status, _best(answer)) == (200, reference(image).argmax())


def test_requests_sent_at_once_are_answered_in_their_order(
    wire: Wire, encode: Encode, reference: Any
) -> None:
    images = [encode(seed) for seed in range(6)]
    requests = [head(len(image), f"X-Request-Id: {n}") + image for n, image in enumerate(images)]
    requests.insert(3, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    requests.insert(5, head(3, path="/predict?top_k=0") + b"abc")
    wire.send(b"".join(requests))
    answers = [wire.answer() for _ in requests]
    assert [status for status, _, _ in answers] == [200, 200, 200, 200, 200, 422, 200, 200]
    answered = [(h["x-request-id"], _best(a)) for _, h, a in answers if "results" in a]
    assert answered == [(str(n), reference(image).argmax()) for n, image in enumerate(images)]


def test_a_client_that_waits_for_100_continue_gets_it(wire: Wire, encode: Encode) -> None:
    image = encode(3)
    wire.send(head(len(image), "Expect: 100-continue"))
    assert wire.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.send(image)
    assert wire.answer()[0] == 200


@pytest.mark.parametrize(
    ("version", "headers"),
    [("1.1", ["Connection: close"]), ("1.0", []), ("1.0", ["Connection: keep-alive"])],
)
def test_a_connection_is_closed_when_the_client_wants_it_or_is_old(
    wire: Wire, encode: Encode, version: str, headers: list[str]
) -> None:
    image = encode(4)
    wire.send(head(len(image), *headers, version=version) + image)
    status, answered, _ = wire.answer()
    assert (status, answered["connection"]) == (200, "close")
    assert wire.closed_by_server()


def test_a_connection_is_closed_once_it_was_idle_since_the_last_answer(
    engine_dir: Path, encode: Encode
) -> None:
    image = encode(4)
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0, keep_alive_s=1)) as server:
        wire = Wire(server)
        with wire.socket:
            first = answered = time.monotonic()
            while answered - first < 0.5:
                wire.send(head(len(image)) + image)
                assert wire.answer()[0] == 200
                answered = time.monotonic()
            assert wire.closed_by_server()
            assert 0.9 < time.monotonic() - answered < 5


def test_a_refusal_does_not_wait_for_the_body_and_the_connection_goes_on(wire: Wire, encode: Encode) -> None:
    wire.send(head(1000, path="/predict?engine=none"))
    status, _, problem = wire.answer()
    assert (status, problem["type"]) == (404, "urn:trimrt:problem:engine-not-found")
    wire.send(b"\0" * 1000)
    image = encode(5)
    wire.send(head(len(image)) + image)
    assert wire.answer()[0] == 200


def test_what_is_no_http_is_refused(server: Running, wire: Wire) -> None:
    wire.send(b"POST /predict HTTP/1.1\r\nContent-Length: many\r\n\r\n")
    assert wire.socket.recv(100).startswith(b"HTTP/1.1 400 ")
    assert server.client.get("/health/live").status_code == 200


def test_head_and_body_of_an_answer_are_one_piece(wire: Wire, encode: Encode) -> None:
    image = encode(6)
    wire.send(head(len(image)) + image)
    piece = wire.socket.recv(1 << 16)
    assert piece.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(piece.partition(b"\r\n\r\n")[2])["results"]


def test_a_client_that_reads_late_is_waited_for_and_gets_every_answer(
    engine_dir: Path, encode: Encode
) -> None:
    image = encode(7)
    count = 400
    with (
        running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as server,
        ThreadPoolExecutor(1) as sender,
    ):
        wire = Wire(server, receive_buffer=4096)
        with wire.socket:
            wire.send(head(len(image)) + image)
            assert wire.answer()[0] == 200
            (connection,) = (
                it for it in server.server.server_state.connections if it.client == wire.socket.getsockname()
            )
            connection.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
            )
            requests = (head(len(image), f"X-Request-Id: {n}") + image for n in range(count))
            sending = sender.submit(wire.send, b"".join(requests))
            wait_until(lambda: connection.flow.write_paused)
            assert sum(server.service.telemetry.requests.values()) < count
            answers = [wire.answer() for _ in range(count)]
            sending.result()
    assert [answer["request_id"] for _, _, answer in answers] == [str(n) for n in range(count)]


def test_an_open_exchange_ends_with_the_answer_when_the_server_drains(
    engine_dir: Path, encode: Encode
) -> None:
    gate = Gate()
    image = encode(8)
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0), load_gated(gate)) as server:
        gate.close()
        wire = Wire(server)
        with wire.socket:
            wire.send(head(len(image)) + image)
            gate.wait_for_arrivals(1)
            server.service.lifecycle.draining = True
            gate.open()
            status, headers, _ = wire.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert wire.closed_by_server()


_REQUESTS = {
    "an image": ({}, {}, None),
    "a form": ({}, {}, "files"),
    "an engine and labels": ({"engine": "other", "top_k": "3"}, {"X-Request-Id": "a"}, None),
    "no such engine": ({"engine": "none"}, {}, None),
    "bad top_k": ({"top_k": "x"}, {}, None),
    "bad timeout": ({}, {"X-Request-Timeout-Ms": ""}, None),
    "not an image": ({}, {}, b"no image"),
    "no image type": ({}, {"Content-Type": "text/plain"}, None),
    "too large": ({}, {}, b"\0" * ((1 << 20) + 1)),
}


@pytest.mark.parametrize("name", _REQUESTS)
def test_the_short_way_and_the_long_one_answer_alike(
    server: Running, encode: Encode, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The long way is taken where the access log is on."""
    params, headers, body = _REQUESTS[name]
    image = encode(9)

    def ask() -> tuple[int, set[str], Any]:
        if body == "files":
            response = server.client.post("/predict", files=[("file", ("a.png", image))] * 2)
        else:
            response = server.predict(body or image, params=params, headers=headers)
        answer = response.json()
        for member in ("request_id", *(("results",) if "results" not in answer else ())):
            answer.pop(member, None)
        for result in answer.get("results", ()):
            assert set(result.pop("latency_ms")) == {"decode", "queue", "inference", "total"}
            result.pop("batch_size")
        return response.status_code, set(response.headers), answer

    short = ask()
    with caplog.at_level(logging.INFO, "trimrt.access"):
        assert ask() == short
        wait_until(lambda: any(record.name == "trimrt.access" for record in caplog.records))


_PIXELS = {"name": "pixels", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [7] * 3072}
_BINARY = {"name": "logits", "parameters": {"binary_data": True}}
_INFERENCES = {
    "pixels": ("tiny", {}, {"inputs": [_PIXELS], "id": "42"}),
    "a version, and a binary answer": ("tiny/versions/1", {}, {"inputs": [_PIXELS], "outputs": [_BINARY]}),
    "an encoded name": ("%74iny", {}, {"inputs": [_PIXELS]}),
    "no such version": ("tiny/versions/2", {}, {"inputs": [_PIXELS]}),
    "no such model": ("none", {}, {"inputs": [_PIXELS]}),
    "no name": ("", {}, {"inputs": [_PIXELS]}),
    "a name beyond all names": ("a" * 201, {}, {"inputs": [_PIXELS]}),
    "compressed": ("tiny", {"Content-Encoding": "gzip"}, {"inputs": [_PIXELS]}),
    "no inputs": ("tiny", {}, {}),
}


@pytest.mark.parametrize("name", _INFERENCES)
def test_both_ways_answer_alike_in_the_open_inference_protocol(
    server: Running, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model, headers, body = _INFERENCES[name]

    def ask() -> tuple[int, set[str], bytes]:
        response = server.client.post(f"/v2/models/{model}/infer", json=body, headers=headers)
        return response.status_code, set(response.headers), response.content

    short = ask()
    with caplog.at_level(logging.INFO, "trimrt.access"):
        assert ask() == short


def test_an_answered_request_is_garbage_for_no_collector(server: Running, encode: Encode) -> None:
    """Its body would be held in memory until one came by."""
    gc.collect()
    gc.disable()
    try:
        for body in (encode(1), b"no image"):
            server.predict(body)
        wait_until(lambda: not any(isinstance(it, Admission | Call) for it in gc.get_objects()), timeout=5)
    finally:
        gc.enable()
