"""Connections: what a client may offer, how much it may send, how long it may wait, and what it then gets."""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gated_engine import Gate, load_gated
from running import Running, running, wait_until
from wire import Wire, head

from server import patience
from server.heads import HEAD_LIMIT
from server.settings import Settings
from server.telemetry import RequestKey

Encode = Callable[..., bytes]

STRAIGHT, APPLICATION = "/predict", "/%70redict"  # the second is too odd for the straight way
CLOSE = "Connection: close"
CHUNKED = "Transfer-Encoding: chunked"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(engine_dir: Path) -> Iterator[Running]:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0, keep_alive_s=1)) as it:
        yield it


@pytest.fixture
def connect(server: Running) -> Iterator[Callable[..., Wire]]:
    opened: list[Wire] = []

    def connect(to: Running = server, **options: Any) -> Wire:
        opened.append(Wire(to, **options))
        return opened[-1]

    yield connect
    for it in opened:
        it.socket.close()


@pytest.fixture(autouse=True)
def still_serving(server: Running, encode: Encode) -> Iterator[None]:
    yield
    assert server.predict(encode(0)).status_code == 200


# --- other protocols ------------------------------------------------------------------------------------


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.0"])
@pytest.mark.parametrize("path", [STRAIGHT, APPLICATION])
def test_an_offer_to_upgrade_is_ignored_and_the_body_kept(
    connect: Callable[..., Wire], encode: Encode, reference: Any, path: str, offer: str
) -> None:
    image = encode(1)
    headers = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {offer}", "HTTP2-Settings: AAMAAABkAAQ"]
    request = head(len(image), *headers, path=path) + image
    wire = connect()
    wire.send(request + request)
    wire.send(*(request[at : at + 100] for at in range(0, len(request), 100)))
    wire.send(head("chunked", *headers, CHUNKED, path=path), b"%x\r\n%b\r\n0\r\n\r\n" % (len(image), image))
    for _ in range(4):
        status, headers_back, answer = wire.answer()
        assert (status, "upgrade" in headers_back) == (200, False)
        assert answer["results"][0]["predictions"][0]["index"] == reference(image).argmax()


@pytest.mark.parametrize("path", ["/health/live", "/v2/health/live", "/stats", "/openapi.json"])
def test_an_offer_to_upgrade_is_ignored_on_every_path(connect: Callable[..., Wire], path: str) -> None:
    wire = connect()
    wire.send(head(0, "Connection: upgrade", "Upgrade: h2c", path=path, method="GET"))
    assert wire.answer()[0] == 200


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", [STRAIGHT, APPLICATION])
def test_an_offer_in_the_last_request_of_a_connection_is_ignored(
    connect: Callable[..., Wire], encode: Encode, path: str, version: str
) -> None:
    image = encode(1)
    wire = connect()
    offer = ["Connection: close, Upgrade", "Upgrade: h2c"]
    wire.send(head(len(image), *offer, path=path, version=version) + image)
    assert wire.answer()[0] == 200
    assert wire.closed_by_server()


def test_a_tunnel_is_refused(connect: Callable[..., Wire]) -> None:
    wire = connect()
    wire.send(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert wire.answer()[0] == 405
    assert wire.closed_by_server()


# --- answers before the end of a request ----------------------------------------------------------------

_EARLY = {
    "no such engine": ("/predict?engine=none", 404),
    "no such model": ("/v2/models/none/infer", 404),
    "no such route": ("/nowhere", 404),
    "too large": (STRAIGHT, 413),
    "too large, through the application": (APPLICATION, 413),
    "not allowed": ("/engines/tiny/unload", 403),
}


@pytest.mark.parametrize("name", _EARLY)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_sends_all_before_it_reads_gets_the_early_refusal(
    connect: Callable[..., Wire], name: str, version: str
) -> None:
    """It would be lost if the connection were closed with the body unread."""
    path, status = _EARLY[name]
    for _ in range(10):
        wire = connect()
        wire.send(head(5 << 20, CLOSE, path=path, version=version), bytes(5 << 20))
        assert wire.answer()[0] == status
        assert wire.closed_by_server()


@pytest.mark.parametrize("headers", [[], [CLOSE]])
@pytest.mark.parametrize("path", ["/predict?engine=none", "/nowhere"])
def test_a_client_that_is_refused_and_then_silent_is_cut_off(
    connect: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch, path: str, headers: list[str]
) -> None:
    monkeypatch.setattr(patience, "LINGER_QUIET_S", 0.2)
    wire = connect()
    wire.send(head(100, *headers, path=path), b"half of it")
    assert wire.answer()[0] == 404
    assert wire.closed_by_server()


@pytest.mark.parametrize("path", [STRAIGHT, APPLICATION, "/predict?engine=none", "/nowhere"])
def test_requests_after_the_last_one_do_not_cost_the_answers_before(
    connect: Callable[..., Wire], encode: Encode, path: str
) -> None:
    """To close with them unread resets the connection."""
    image = encode(0)
    for _ in range(10):
        wire = connect()
        wire.send(head(len(image), path=path), image, head(len(image), CLOSE, path=path), image)
        wire.send(*[head(1 << 18, path=path) + bytes(1 << 18)] * 4)
        first, last = wire.answer(), wire.answer()
        assert first[0] == last[0] == (200 if path in (STRAIGHT, APPLICATION) else 404)
        assert last[1]["connection"] == "close"
        assert wire.closed_by_server()


@pytest.mark.parametrize("limit", ["LINGER_S", "LINGER_BYTES"])
@pytest.mark.parametrize("path", ["/predict?engine=none", "/nowhere"])
def test_what_follows_a_refusal_is_read_for_so_long_and_so_much(
    connect: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch, path: str, limit: str
) -> None:
    monkeypatch.setattr(patience, limit, 0)
    wire = connect()
    wire.send(head(1 << 40, path=path))
    assert wire.answer()[0] == 404
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        wire.send(*itertools.repeat(bytes(1 << 20), 10_000))


# --- clients that send no more --------------------------------------------------------------------------


@pytest.mark.parametrize("path", [STRAIGHT, APPLICATION])
def test_a_client_that_closes_its_half_is_answered(
    connect: Callable[..., Wire], encode: Encode, path: str
) -> None:
    image = encode(2)
    wire = connect()
    wire.send((head(len(image), path=path) + image) * 3, LIVE)
    wire.socket.shutdown(socket.SHUT_WR)
    assert [wire.answer()[0] for _ in range(4)] == [200] * 4
    assert wire.closed_by_server()


@contextmanager
def waiting_beside_one_that_leaves(
    connect: Callable[..., Wire], engine_dir: Path, image: bytes, version: str
) -> Iterator[Wire]:
    """A client that closed its half and waits; the request of another, which left, was given up meanwhile."""
    gate = Gate()
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0), load_gated(gate)) as gated:
        gate.close()
        waits, leaves = connect(gated), connect(gated)
        for wire in (waits, leaves):
            wire.send(head(len(image), version=version) + image)
        gate.wait_for_arrivals(1)
        waits.socket.shutdown(socket.SHUT_WR)
        leaves.socket.close()
        counted = gated.service.telemetry.requests
        wait_until(lambda: counted[RequestKey("predict", "cancelled", "disconnected")] == 1)
        gate.open()
        yield waits


def test_a_client_that_leaves_is_told_from_one_that_waits(
    connect: Callable[..., Wire], engine_dir: Path, encode: Encode
) -> None:
    with waiting_beside_one_that_leaves(connect, engine_dir, encode(3), "1.1") as waits:
        interim = b"HTTP/1.1 102 Processing\r\n\r\n"
        assert waits.socket.recv(len(interim)) == interim
        while waits.socket.recv(len(interim), socket.MSG_PEEK) == interim:
            waits.socket.recv(len(interim))
        assert waits.answer()[0] == 200


def test_a_client_of_http_1_0_that_leaves_is_told_from_one_that_waits(
    connect: Callable[..., Wire], engine_dir: Path, encode: Encode
) -> None:
    """As nginx's clients leave; there are no interim answers, but an answer may come in pieces."""
    with waiting_beside_one_that_leaves(connect, engine_dir, encode(3), "1.0") as waits:
        assert waits.answer()[0] == 200
        assert waits.closed_by_server()


def test_a_client_that_closes_its_half_too_early_is_gone(
    connect: Callable[..., Wire], server: Running, encode: Encode
) -> None:
    key = RequestKey("predict", "cancelled", "disconnected")
    before = server.service.telemetry.requests[key]
    wire = connect()
    wire.send(head(100), b"half of it")
    wire.socket.shutdown(socket.SHUT_WR)
    assert wire.closed_by_server()
    wait_until(lambda: server.service.telemetry.requests[key] == before + 1)


# --- limits ---------------------------------------------------------------------------------------------

_MANY = b"".join(b"a%d: b\r\n" % n for n in range(2000))
_TOO_LONG = {
    "a header": b"GET / HTTP/1.1\r\nX: " + b"a" * HEAD_LIMIT + b"\r\n\r\n",
    "a header's name": b"GET / HTTP/1.1\r\n" + b"a" * HEAD_LIMIT + b": b\r\n\r\n",
    "a path": b"GET /" + b"a" * HEAD_LIMIT + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + _MANY + b"\r\n",
    "a header without an end": b"GET / HTTP/1.1\r\nX: " + b"a" * (4 << 20),
    "headers without an end": b"GET / HTTP/1.1\r\n" + _MANY * 100,
    "trailers": head("", CHUNKED) + b"1\r\nx\r\n0\r\n" + _MANY * 20 + b"\r\n",
    "a trailer without an end": head("", CHUNKED) + b"1\r\nx\r\n0\r\nX: " + b"a" * (4 << 20),
    "what a chunk says of itself": head("", CHUNKED) + b"1;" + b"a" * (4 << 20),
    "the same, through the application": head("", CHUNKED, path=APPLICATION) + b"1;" + b"a" * (4 << 20),
}


@pytest.mark.parametrize("name", _TOO_LONG)
def test_more_than_a_head_may_hold_is_refused_as_it_comes(connect: Callable[..., Wire], name: str) -> None:
    wire = connect()
    wire.send(_TOO_LONG[name])
    status, _, problem = wire.answer()
    assert (status, problem["type"]) == (431, "urn:trimrt:problem:head-too-large")
    assert wire.closed_by_server()


def test_a_head_may_come_byte_by_byte_and_fill_its_limit(connect: Callable[..., Wire]) -> None:
    wire = connect()
    wire.send(*(LIVE[at : at + 1] for at in range(len(LIVE))))
    assert wire.answer()[0] == 200
    wire.send(head(0, "X: " + "a" * (HEAD_LIMIT - 1000), path="/health/live", method="GET"))
    assert wire.answer()[0] == 200


@pytest.mark.parametrize(
    "sent", [b"", b"\r\n", b"GET / HT", b"POST /predict HTTP/1.1\r\nHost: x\r\n"], ids=repr
)
def test_a_client_whose_head_never_ends_is_cut_off(
    connect: Callable[..., Wire], impatient: Running, sent: bytes
) -> None:
    fresh, used = connect(impatient), connect(impatient)
    used.send(LIVE)
    assert used.answer()[0] == 200
    for wire in (fresh, used):
        wire.send(sent)
    assert fresh.closed_by_server()
    assert used.closed_by_server()


def test_a_client_that_feeds_its_head_drop_by_drop_is_cut_off(
    connect: Callable[..., Wire], impatient: Running
) -> None:
    wire = connect(impatient)
    wire.send(b"GET / HTTP/1.1\r\n")
    wire.socket.settimeout(0.05)
    for _ in range(200):
        try:
            wire.send(b"a: b\r\n")
            if wire.socket.recv(1) == b"":
                return
        except TimeoutError:
            continue
        except OSError:
            return
    pytest.fail("the server read on for ten seconds")


def test_a_client_that_never_reads_its_answers_is_cut_off(
    connect: Callable[..., Wire], impatient: Running
) -> None:
    wire = connect(impatient, receive_buffer=4096)
    request = head(0, path="/docs/assets/swagger-ui-bundle.js", method="GET")
    wire.send(request * 20)
    connections = impatient.server.server_state.connections
    us = wire.socket.getsockname()
    wait_until(lambda: any(it.client == us for it in connections))
    wait_until(lambda: not any(it.client == us for it in connections))


def test_a_great_many_requests_sent_at_once_are_taken_a_few_at_a_time(
    connect: Callable[..., Wire], server: Running
) -> None:
    """They wait as bytes: an object for each would cost many times their size."""
    count = 3000
    wire = connect()
    connections = server.server.server_state.connections
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(wire.send, LIVE * count)
        longest = 0
        for _ in range(count):
            assert wire.answer()[0] == 200
            longest = max(longest, *(len(it.pipeline) for it in list(connections)))
        sending.result()
    assert 0 < longest < 150


def test_clients_that_leave_in_the_midst_of_many_requests_leave_nothing(
    connect: Callable[..., Wire], server: Running, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    image = encode(6)
    for path in (STRAIGHT, APPLICATION):
        for _ in range(10):
            wire = connect()
            wire.send((head(len(image), path=path) + image) * 100)
            wire.socket.close()
    wait_until(lambda: server.service.telemetry.in_flight == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# --- what is no HTTP ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [STRAIGHT, APPLICATION])
def test_a_broken_chunk_ends_the_request(connect: Callable[..., Wire], server: Running, path: str) -> None:
    key = RequestKey("predict", "cancelled", "disconnected")
    before = server.service.telemetry.requests[key]
    wire = connect()
    wire.send(head("", CHUNKED, path=path), b"zz\r\n", bytes(1 << 20))
    status, _, problem = wire.answer()
    assert (status, problem["type"]) == (400, "urn:trimrt:problem:malformed-request")
    assert wire.closed_by_server()
    wait_until(lambda: server.service.telemetry.requests[key] == before + 1)


def test_what_came_before_the_nonsense_is_answered(connect: Callable[..., Wire], encode: Encode) -> None:
    image = encode(4)
    wire = connect()
    wire.send((head(len(image)) + image) * 3 + b"\0nonsense\r\n\r\n")
    assert [wire.answer()[0] for _ in range(3)] == [200] * 3
    assert wire.closed_by_server()


@pytest.mark.parametrize(
    "target", ["*", "x:1", "/pr\xe9dict", "http:///x", "/predict%0A", "/health/live%0a", "/page/%7f", "/%1Fx"]
)
def test_a_target_that_is_no_path_is_refused(connect: Callable[..., Wire], target: str) -> None:
    for offer in ("", "Connection: Upgrade\r\nUpgrade: h2c\r\n"):
        wire = connect()
        wire.send(f"OPTIONS {target} HTTP/1.1\r\nHost: x\r\n{offer}\r\n".encode("latin-1"))
        assert wire.answer()[0] == 400


# Two programs that read one of these differently could be made to see different requests (RFC 9112, 11.2).
_TWO_MEANINGS = {
    "two hosts": (head(3, "Host: y"), 400, "malformed-request"),
    "the same host twice": (head(3, "Host: x"), 400, "malformed-request"),
    "no host": (b"POST /predict HTTP/1.1\r\nContent-Length: 3\r\n\r\n", 400, "malformed-request"),
    "a body in two codings": (head("", "Transfer-Encoding: gzip, chunked"), 501, "coding-not-supported"),
    "two lines of codings": (head("", "Transfer-Encoding: gzip", CHUNKED), 501, "coding-not-supported"),
    "an empty coding": (head("", "Transfer-Encoding: ,chunked"), 501, "coding-not-supported"),
    "a body of another coding": (head("", "Transfer-Encoding: gzip"), 501, "coding-not-supported"),
    "chunks twice": (head("", CHUNKED, CHUNKED), 400, "malformed-request"),
    "chunks and a length": (head(3, CHUNKED), 400, "malformed-request"),
    "chunks in HTTP/1.0": (head("", CHUNKED, version="1.0"), 400, "malformed-request"),
    "two lengths": (head(3, "Content-Length: 4"), 400, "malformed-request"),
    "HTTP/2.0": (head(3, version="2.0"), 505, "version-not-supported"),
    "HTTP/0.9": (head(3, version="0.9"), 505, "version-not-supported"),
    "a line without a version": (b"GET /health/live\r\n\r\n", 505, "version-not-supported"),
    "HTTP/1.2": (head(3, version="1.2"), 400, "malformed-request"),
    "HTTP/3.0": (head(3, version="3.0"), 400, "malformed-request"),
}


@pytest.mark.parametrize("name", _TWO_MEANINGS)
def test_a_head_with_two_meanings_is_refused_and_nothing_after_it_is_read(
    connect: Callable[..., Wire], name: str
) -> None:
    request, status, problem = _TWO_MEANINGS[name]
    for offer in (b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"):
        wire = connect()
        wire.send(request.removesuffix(b"\r\n" if offer else b"") + offer, b"3\r\nabc\r\n0\r\n\r\n", LIVE)
        answered, _, answer = wire.answer()
        assert (answered, answer["type"]) == (status, f"urn:trimrt:problem:{problem}")
        assert wire.closed_by_server()


def test_http_1_0_needs_no_host(connect: Callable[..., Wire]) -> None:
    wire = connect()
    wire.send(b"GET /health/live HTTP/1.0\r\n\r\n")
    assert wire.answer()[0] == 200


@pytest.mark.parametrize("path", [STRAIGHT, APPLICATION])
def test_a_trailer_is_no_header(connect: Callable[..., Wire], encode: Encode, path: str) -> None:
    image = encode(5)
    wire = connect()
    wire.send(head("", CHUNKED, path=path))
    wire.send(b"%x\r\n%b\r\n0\r\nContent-Type: text/plain\r\n\r\n" % (len(image), image))
    assert wire.answer()[0] == 200


@pytest.mark.parametrize("path", [STRAIGHT, APPLICATION, "/v2/models/tiny/infer"])
def test_a_length_of_thousands_of_digits_is_refused(connect: Callable[..., Wire], path: str) -> None:
    wire = connect()
    wire.send(head("", "Content-Length: " + "0" * 5000 + "3", path=path), b"abc")
    assert wire.answer()[0] == 400
