"""`/stream`: live video over a WebSocket, with other people's client and real engines."""

from __future__ import annotations

import base64
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from gated_engine import Gate, load_gated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from running import Running, running, wait_until
from streaming import stream
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from wire import Wire

from server.settings import Settings
from server.telemetry import RequestKey

Encode = Callable[..., bytes]
Start = Callable[..., Running]

KEY = "correct hörse"


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def start(engine_dir: Path, gate: Gate) -> Iterator[Start]:
    """A server with those settings, an open gate before its engine; in the end no stream left anything."""
    with ExitStack() as stack:

        def start(**settings: object) -> Running:
            configured = Settings(**{"engine": "tiny", "engine_dir": engine_dir, "port": 0, **settings})
            server = stack.enter_context(running(configured, load_gated(gate)))
            stack.callback(wait_until, lambda: nothing_is_left(server))
            stack.callback(gate.open)
            return server

        yield start


def nothing_is_left(server: Running) -> bool:
    service = server.service
    pending = sum(scheduler.pending for scheduler in service.registry.loaded.values())
    return service.telemetry.in_flight == service.body_memory.held == pending == 0


def counted(server: Running, outcome: str, reason: str = "") -> int:
    return server.service.telemetry.requests[RequestKey("stream", outcome, reason)]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_frame_is_answered_as_by_predict(server: Running, encode: Encode, form: str) -> None:
    image = encode(1, form)
    asked = server.predict(image, params={"engine": "other", "top_k": 2}).json()
    with stream(server, engine="other", top_k=2) as it:
        answer = it.ask(image)
    assert answer["frame"] == answer["dropped"] == 0
    assert answer["engine"] == asked["engine"]
    assert answer["results"][0]["predictions"] == asked["results"][0]["predictions"]
    assert set(answer) - {"frame", "dropped"} == set(asked)


def test_frames_are_answered_in_order(server: Running, encode: Encode) -> None:
    images = [encode(seed) for seed in range(4)]
    asked = [server.predict(image).json()["results"][0]["predictions"] for image in images]
    with stream(server) as it:
        answers = [it.ask(images[number % 4]) for number in range(40)]
    assert [answer["frame"] for answer in answers] == list(range(40))
    for number, answer in enumerate(answers):
        assert answer["results"][0]["predictions"] == asked[number % 4]


def test_the_newest_frame_wins_while_the_engine_is_busy(start: Start, gate: Gate, encode: Encode) -> None:
    server = start()
    expected = server.predict(encode(5)).json()["results"][0]["predictions"]
    gate.close()
    with stream(server) as it:
        it.send(encode(0))
        gate.wait_for_arrivals(1)
        it.send(*(encode(seed) for seed in range(1, 6)))
        wait_until(lambda: counted(server, "cancelled", "superseded") == 4)
        assert server.service.telemetry.in_flight == 2, "one under way, the newest waits"
        gate.open()
        first, last = it.answer(), it.answer()
        assert (first["frame"], first["dropped"]) == (0, 0)
        assert (last["frame"], last["dropped"]) == (5, 4)
        assert last["results"][0]["predictions"] == expected
        assert (after := it.ask(encode(1)))["dropped"] == 0
        assert after["frame"] == 6
    assert counted(server, "ok") == 3


def test_a_frame_may_come_in_pieces(server: Running, encode: Encode) -> None:
    image = encode(2)
    with stream(server) as it:
        it.socket.send([image[:10], b"", image[10:40], image[40:]])
        assert it.answer()["results"]
        assert it.ask(image)["frame"] == 1


def test_the_stream_outlives_frames_that_are_no_images(server: Running, encode: Encode) -> None:
    with stream(server) as it:
        for body in (b"no image", b"", encode(0, "JPEG")[:200]):
            assert it.ask(body)["type"] == "urn:trimrt:problem:image-damaged"
        answer = it.ask(encode(0))
        assert answer["frame"] == 3
        assert answer["results"]


def test_the_stream_outlives_a_full_queue(start: Start, gate: Gate, encode: Encode) -> None:
    server = start(queue_limit=1)
    gate.close()
    with stream(server) as it, stream(server) as other:
        it.send(encode(0))
        gate.wait_for_arrivals(1)
        assert other.ask(encode(0))["type"] == "urn:trimrt:problem:queue-full"
        gate.open()
        assert it.answer()["results"]
        assert other.ask(encode(0))["results"]


def test_the_stream_outlives_deadlines(start: Start, gate: Gate, encode: Encode) -> None:
    server = start()
    gate.close()
    with stream(server, headers={"X-Request-Timeout-Ms": "300"}) as it:
        it.send(encode(0), encode(1))
        gate.wait_for_arrivals(1)
        for number in range(2):
            answer = it.answer()
            assert answer["type"] == "urn:trimrt:problem:deadline-exceeded"
            assert answer["frame"] == number
        gate.open()
        wait_until(lambda: nothing_is_left(server))
        assert it.ask(encode(0))["frame"] == 2


@pytest.mark.parametrize(
    ("query", "code", "problem"),
    [
        ({"engine": "none"}, 4404, "engine-not-found"),
        ({"top_k": "11"}, 4422, "invalid-parameter"),
    ],
)
def test_what_every_frame_would_meet_closes_the_stream(
    server: Running, encode: Encode, query: dict[str, str], code: int, problem: str
) -> None:
    with stream(server, **query) as it:
        answer = it.ask(encode(0))
        assert answer["type"] == f"urn:trimrt:problem:{problem}"
        closed, reason = it.closed()
    assert closed == code
    assert reason.startswith(f"{problem}: {answer['detail'][:50]}")


def test_a_frame_that_is_too_large_is_not_read(start: Start, encode: Encode) -> None:
    server = start(max_body_bytes=100_000)
    with stream(server) as it:
        it.send(encode(0), bytes(100_001))
        assert it.answer()["results"], "what was whole before is answered"
        assert it.answer()["type"] == "urn:trimrt:problem:body-too-large"
        assert it.closed()[0] == 1009
    assert counted(server, "invalid", "body-too-large") == 1


def test_frames_that_are_still_coming_count_among_the_bodies(start: Start, encode: Encode) -> None:
    server = start(max_body_memory_bytes=200_000, max_body_bytes=200_000)
    pieces, more = iter([bytes(150_000), b"x"]), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield next(pieces)
        assert more.wait(20)
        yield next(pieces)

    with stream(server) as it, stream(server) as other:
        sending = threading.Thread(target=lambda: it.socket.send(slowly()))
        sending.start()
        wait_until(lambda: server.service.body_memory.held == 150_000)
        assert other.ask(bytes(100_000))["type"] == "urn:trimrt:problem:queue-full"
        more.set()
        sending.join()
        assert it.answer()["type"] == "urn:trimrt:problem:image-damaged"
        assert other.ask(encode(0))["results"]


def test_a_frame_must_arrive_in_time(start: Start) -> None:
    server = start(timeout_ms=300)
    wire = _raw_stream(server)
    with wire.socket:
        wire.send(b"\x02\x85" + bytes(4) + b"begun")
        assert b"body-timeout" in _read_until(wire, b"}")
        assert _read_until(wire, b"after 0.3 s").startswith(b"\x88")
    assert counted(server, "expired", "body-timeout") == 1


def test_text_is_no_frame(server: Running) -> None:
    with stream(server) as it:
        it.socket.send("hello")
        assert it.closed() == (1003, "frames are binary messages")


def test_a_stream_without_frames_is_closed(start: Start) -> None:
    server = start(keep_alive_s=1)
    with stream(server) as it:
        assert it.closed() == (4408, "no frame came for 1 s")


def test_a_client_that_is_not_there_any_more_is_noticed(start: Start, encode: Encode) -> None:
    server = start(keep_alive_s=1)
    wire = _raw_stream(server)
    with wire.socket:
        assert wire.socket.recv(2) == b"\x89\x00", "it is asked by a ping"
        assert wire.closed_by_server()


def _raw_stream(server: Running, receive_buffer: int | None = None, *, early: bytes = b"") -> Wire:
    wire = Wire(server, receive_buffer)
    key = base64.b64encode(bytes(16)).decode()
    lines = [
        "GET /stream HTTP/1.1",
        "Host: x",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
    ]
    wire.send("\r\n".join([*lines, "", ""]).encode() + early)
    if not early:
        assert _read_until(wire, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    return wire


def _read_until(wire: Wire, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        received += wire.socket.recv(1)
    return received


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame, whose mask is zeros."""
    length = len(payload)
    head = bytes([0x80 | opcode, 0x80 | (length if length < 126 else 126)])
    return head + (length.to_bytes(2, "big") if length >= 126 else b"") + bytes(4) + payload


def test_frames_may_not_come_before_the_handshake_is_answered(server: Running, encode: Encode) -> None:
    wire = _raw_stream(server, early=masked(2, encode(0)))
    with wire.socket:
        assert wire.answer()[0] == 400
        assert wire.closed_by_server()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x82\x05hello",
        b"\xf2\x80" + bytes(4),
        b"\xc2\x80" + bytes(4),
        b"\x8f\x80" + bytes(4),
        b"\x80\x80" + bytes(4),
        b"\x09\x80" + bytes(4),
        b"\x89\xfe\x00\x7e" + bytes(4),
        b"\x82\xff\xff" + bytes(11),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=[
        *("unmasked", "reserved bits", "compressed", "unknown opcode", "continues nothing", "ping in pieces"),
        *("ping too long", "negative length", "HTTP"),
    ],
)
def test_what_is_no_websocket_closes_it(server: Running, sent: bytes) -> None:
    wire = _raw_stream(server)
    with wire.socket:
        wire.send(sent)
        answered = wire.socket.recv(1000)
        assert answered[0] == 0x88
        assert int.from_bytes(answered[2:4], "big") == 1002
        assert wire.closed_by_server()


def test_a_client_that_does_not_read_is_not_read_either(start: Start, encode: Encode) -> None:
    server = start()
    wire = _raw_stream(server, receive_buffer=4096)
    with wire.socket:
        asking = threading.Thread(target=_send_for_ever, args=(wire, masked(9, bytes(125)) * 100))
        asking.start()
        (connection,) = (it for it in server.server.server_state.connections if it.handed_over)
        wait_until(lambda: not connection.transport.is_reading())
        wait_until(lambda: connection.transport.get_write_buffer_size() > 0)
        answered = server.predict(encode(0))
        assert answered.status_code == 200, "others are served"
        wait_until(lambda: not connection.transport.is_reading())  # the system's buffers may grow
        wire.socket.shutdown(socket.SHUT_WR)
        asking.join()


def test_a_frame_in_pieces_with_pings_between_is_one_frame(server: Running, encode: Encode) -> None:
    image = encode(0)
    wire = _raw_stream(server)
    with wire.socket:
        pieces = [image[:10], b"", image[10:100], image[100:]]
        for number, piece in enumerate(pieces):
            opcode = 0 if number else 2
            data = masked(opcode, piece)
            if number < len(pieces) - 1:
                data = bytes([data[0] & 0x7F]) + data[1:]  # more follows
            wire.send(data, masked(9, b"there?"))
        pongs, answer = 0, b""
        while b'"results"' not in answer:
            head = wire.socket.recv(2)
            length = head[1] if head[1] < 126 else int.from_bytes(wire.socket.recv(2), "big")
            answer = wire.socket.recv(length, socket.MSG_WAITALL)
            pongs += answer == b"there?"
        assert b'"frame":0' in answer
        assert pongs <= len(pieces)


def test_a_frame_in_endless_empty_pieces_ends_the_stream(server: Running) -> None:
    wire = _raw_stream(server)
    with wire.socket:
        wire.send(b"\x02\x80" + bytes(4))
        with suppress(ConnectionResetError, BrokenPipeError):
            wire.send((b"\x00\x80" + bytes(4)) * 20_000)
        said = wire.socket.recv(4096)
        assert b"malformed-request" in said
        assert (4400).to_bytes(2, "big") in said + wire.socket.recv(4096)


@pytest.mark.parametrize("frames", [0, 1], ids=["no frame", "a frame"])
def test_a_client_that_closes_its_half_is_gone(start: Start, encode: Encode, frames: int) -> None:
    server = start()
    wire = _raw_stream(server)
    with wire.socket:
        wire.send(masked(2, encode(0)) * frames)
        wire.socket.shutdown(socket.SHUT_WR)
        while wire.socket.recv(4096):
            pass
    wait_until(lambda: not [it for it in server.server.server_state.connections if it.handed_over])


@pytest.mark.parametrize(
    "protocols", [["chat"], ["trimrt.key."], ["trimrt.key.!!"], ["trimrt.key.x", "trimrt"]]
)
def test_an_odd_subprotocol_is_no_key_and_no_obstacle(
    start: Start, encode: Encode, protocols: list[str]
) -> None:
    open_to_all, locked = start(), start(api_key=SecretStr(KEY), protect_predict=True)
    with stream(open_to_all, protocols=protocols) as it:
        assert "results" in it.ask(encode(0))
    with stream(locked, protocols=protocols) as it:
        assert it.ask(encode(0))["type"] == "urn:trimrt:problem:unauthorized"
        assert it.closed()[0] == 4401


def test_two_hundred_streams_keep_nobody_waiting_and_leave_nothing(start: Start, encode: Encode) -> None:
    server = start()
    with ExitStack() as stack:
        wires = [_raw_stream(server) for _ in range(200)]
        for wire in wires:
            stack.enter_context(wire.socket)
        for wire in wires:
            wire.send(masked(2, encode(0)))
        assert server.predict(encode(0)).elapsed.total_seconds() < 5
        for wire in wires:
            assert b'"frame":0' in wire.socket.recv(4096)
    wait_until(lambda: not [it for it in server.server.server_state.connections if it.handed_over])


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda first, payload, mask: (
                    bytes([first, (0x80 if mask else 0) | len(payload)]) + bytes(4 if mask else 0) + payload
                ),
                st.integers(0, 255),
                st.binary(max_size=125),
                st.booleans(),
            ),
        ),
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_sent_the_server_goes_on(
    server: Running, caplog: pytest.LogCaptureFixture, sent: list[bytes]
) -> None:
    wire = _raw_stream(server)
    with wire.socket, suppress(OSError):  # the server may have closed before
        wire.send(*sent)
        wire.socket.shutdown(socket.SHUT_WR)
        while wire.socket.recv(4096):
            pass
    wait_until(lambda: nothing_is_left(server))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_leaves_frees_what_it_had(start: Start, gate: Gate, encode: Encode) -> None:
    server = start()
    gate.close()
    with stream(server) as it:
        it.send(encode(0))
        gate.wait_for_arrivals(1)
        it.send(encode(1))
        wait_until(lambda: server.service.telemetry.in_flight == 2)
        it.socket.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: counted(server, "cancelled", "disconnected") == 2)


def test_many_tiny_frames_keep_nobody_waiting(server: Running, encode: Encode) -> None:
    wire = _raw_stream(server)
    with wire.socket:
        flood = threading.Thread(target=_send_for_ever, args=(wire, masked(2, b"x") * 10_000))
        flood.start()
        for _ in range(20):
            assert server.predict(encode(0)).elapsed.total_seconds() < 1
        wire.socket.shutdown(socket.SHUT_RDWR)
        flood.join()


def _send_for_ever(wire: Wire, data: bytes) -> None:
    with suppress(OSError):
        while True:
            wire.send(data)


# --- who may open a stream ---------------------------------------------------------------------------------


def _subprotocols(key: str) -> list[str]:
    return ["trimrt", "trimrt.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")]


def _sent_as_utf8(text: str) -> str:
    """The value of a header that the client's versions, which encode differently, send as `text` in UTF-8."""
    return text if "é".encode() in Headers(x="é").serialize() else text.encode().decode("latin-1")


def test_the_key_is_asked_for_where_inference_is_protected(start: Start, encode: Encode) -> None:
    server = start(api_key=SecretStr(KEY), protect_predict=True)
    ways = [
        ({}, None, None, False),
        ({"X-API-Key": "wrong"}, None, None, False),
        ({"X-API-Key": _sent_as_utf8(KEY)}, None, None, True),
        ({"Authorization": "Bearer " + _sent_as_utf8(KEY)}, None, None, True),
        ({}, _subprotocols(KEY), "trimrt", True),
        ({}, _subprotocols("wrong"), "trimrt", False),
        ({}, ["trimrt", "trimrt.key.!"], "trimrt", False),
    ]
    for headers, protocols, accepted, passes in ways:
        with stream(server, headers=headers, protocols=protocols) as it:
            assert it.socket.subprotocol == accepted
            answer = it.ask(encode(0))
            if passes:
                assert answer["results"]
            else:
                assert answer["type"] == "urn:trimrt:problem:unauthorized"
                assert it.closed()[0] == 4401


@pytest.mark.parametrize(
    ("cors", "origin", "opens"),
    [
        ("", "{url}", True),
        ("", "https://shop.example", False),
        ("", "null", False),
        ("https://shop.example/, https://other.example", "https://shop.example", True),
        ("https://shop.example", "http://shop.example", False),
        ("*", "https://anyone.example", True),
    ],
)
def test_pages_of_other_sites_open_no_stream_unless_they_are_named(
    start: Start, encode: Encode, cors: str, origin: str, opens: bool
) -> None:
    server = start(cors_origin=cors)
    if opens:
        with stream(server, origin=origin.format(url=server.url)) as it:
            assert it.ask(encode(0))["results"]
        return
    with pytest.raises(InvalidStatus) as refused, stream(server, origin=origin):
        pass
    assert refused.value.response.status_code == 403
    assert b"--cors-origin" in refused.value.response.body


def test_who_asks_for_no_websocket_is_told(server: Running) -> None:
    offers = [
        {},
        {"Connection": "Upgrade", "Upgrade": "h2c"},
        {"Connection": "Upgrade", "Upgrade": "websocket"},
        {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "8",
            "Sec-WebSocket-Key": "k",
        },
    ]
    for headers in offers:
        answer = server.client.get("/stream", headers=headers)
        assert answer.status_code == 426
        assert answer.headers["sec-websocket-version"] == "13"
        assert answer.json()["type"] == "urn:trimrt:problem:upgrade-required"
    assert server.client.get("/health/live").status_code == 200, "the connection goes on"


# --- stopping, and what is told ----------------------------------------------------------------------------


def test_a_drain_answers_what_was_whole_and_closes_with_1001(
    start: Start, gate: Gate, encode: Encode
) -> None:
    server = start(grace_s=20)
    gate.close()
    with stream(server) as busy, stream(server) as idle, stream(server) as late:
        busy.send(encode(0))
        gate.wait_for_arrivals(1)
        busy.send(encode(1))
        wait_until(lambda: server.service.telemetry.in_flight == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.service.lifecycle.refusing)
        assert late.ask(encode(0))["type"] == "urn:trimrt:problem:not-ready"
        assert late.closed() == (1001, "the server is draining")
        gate.open()
        assert [busy.answer()["frame"] for _ in range(2)] == [0, 1]
        for it in (busy, idle):
            assert it.closed() == (1001, "the server stops")


def test_streams_are_logged_and_counted(
    start: Start, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trimrt.access")
    server = start()
    with stream(server, headers={"X-Request-Id": "camera-7"}) as it:
        assert it.socket.response.headers["X-Request-Id"] == "camera-7"
        assert it.ask(encode(0))["request_id"] == "camera-7"
        it.ask(encode(1))
    wait_until(lambda: any(record.__dict__.get("path") == "/stream" for record in caplog.records))
    (line,) = (record.__dict__ for record in caplog.records if record.__dict__.get("path") == "/stream")
    assert (line["request_id"], line["status"], line["frames"], line["dropped"]) == ("camera-7", 101, 2, 0)
    assert (
        'trimrt_requests_total{outcome="ok",protocol="stream",reason=""} 2.0'
        in server.client.get("/metrics").text
    )
