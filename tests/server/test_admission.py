"""What every inference request meets: each test runs over every carrier that it is true for.

Clients and servers are real; where a request must be under way, its engine waits behind a gate.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from carriers import HTTP, Carrier, Grpc, Http, Predict, PredictThroughAsgi, Rest, Sent, carrier
from gated_engine import Gate, load_gated
from pydantic import SecretStr
from running import running, wait_until

from server.admission import Admission
from server.settings import Settings
from server.telemetry import Ended
from server.v2.grpc_call import address_of

Encode = Callable[..., bytes]
Start = Callable[..., Carrier]

QUEUE_LIMIT = 12
KEY = "correct horse"
ELSEWHERE = {"X_Forwarded_For": "198.51.100.1"}  # a local proxy's client

over_http = pytest.mark.parametrize("kind", HTTP.values(), ids=HTTP)
over_predict = pytest.mark.parametrize("kind", [Predict, PredictThroughAsgi], ids=["predict", "predict-asgi"])


@pytest.fixture
def start(
    kind: type[Carrier], engine_dir: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> Iterator[Start]:
    """A server with those settings and a client of `kind`; in the end nothing of any request is left."""
    caplog.set_level(logging.INFO, "trimrt.grpc")
    with ExitStack() as stack:

        def start(**settings: object) -> Carrier:
            options = {"engine": "tiny", "engine_dir": engine_dir, "port": 0, "queue_limit": QUEUE_LIMIT}
            options["grpc_port"] = 0 if kind is Grpc else None
            configured = Settings(**{**options, **settings})
            server = stack.enter_context(running(configured, load_gated(gate)))
            ports = [int(log.grpc.rpartition(":")[2]) for log in caplog.records if hasattr(log, "grpc")]
            it = stack.enter_context(carrier(kind, server, *ports or [0]))
            stack.callback(wait_until, lambda: nothing_is_left(it))
            stack.callback(gate.open)
            gate.close()
            return it

        yield start


def nothing_is_left(it: Carrier) -> bool:
    service = it.server.service
    pending = sum(scheduler.pending for scheduler in service.registry.loaded.values())
    return service.telemetry.in_flight == service.body_memory.held == pending == 0


def pending(it: Carrier, engine: str = "tiny") -> int:
    return it.server.service.registry.get(engine).pending


def dropped(it: Carrier) -> dict[str, int]:
    return it.server.service.registry.get(None).stats.dropped


def only_these_are_computed(gate: Gate, *sent: Sent) -> None:
    """Requests for one image each, of which the first is at the gate."""
    for number, it in enumerate(sent, 1):
        gate.wait_for_arrivals(number)
        gate.allow(1)
        assert it.answer().error == ""
    assert gate.batches == [1] * len(sent), "others were computed too"


def test_images_are_answered_and_counted(
    start: Start, gate: Gate, encode: Encode, reference: Callable
) -> None:
    it = start()
    gate.open()
    images = [encode(0), encode(1)]
    answer = it.ask(*images)
    assert answer.error == ""
    assert list(answer.best) == [reference(image).argmax() for image in images]
    wait_until(lambda: it.counted("ok", "") == 1)


def test_a_request_takes_the_way_that_it_is_named_for(start: Start, gate: Gate, encode: Encode) -> None:
    it = start()
    sent = it.send(encode(0))
    gate.wait_for_arrivals(1)
    assert len(it.server.server.server_state.tasks) == (1 if it.asgi else 0)
    gate.open()
    assert sent.answer().error == ""


# --- the drain ------------------------------------------------------------------------------------------


def test_a_drain_refuses_new_requests_and_waits_for_those_under_way(
    start: Start, gate: Gate, encode: Encode
) -> None:
    it = start()
    assert (it.is_well("live"), it.is_well("ready")) == (True, True)
    image = encode(0)
    sent = it.send(image)
    gate.wait_for_arrivals(1)
    it.server.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: it.server.service.lifecycle.refusing)
    refusing_since = time.monotonic()
    while time.monotonic() - refusing_since < 0.6:  # longer than a drain with nothing to wait for takes
        refused = it.ask(image)
        assert (refused.error, refused.detail) == (it.error("not-ready"), "the server is draining")
        assert (it.is_well("live"), it.is_well("ready")) == (True, False)
        assert not it.server.server.should_exit
    assert it.counted("rejected", "not-ready") > 0
    gate.open()
    assert sent.answer().error == ""
    wait_until(lambda: it.server.server.should_exit)


# --- the key --------------------------------------------------------------------------------------------


def test_a_protected_server_asks_everyone_for_the_key(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(api_key=SecretStr(KEY), protect_predict=True)
    image = encode(0)
    for headers in ({}, ELSEWHERE, {"X_API_Key": KEY[:-1]}, {"Authorization": f"Bearer {KEY}s"}):
        refused = it.ask(image, **headers)
        assert refused.error == it.error("unauthorized")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.detail == "send the API key as `Authorization: Bearer <key>` or as `X-API-Key: <key>`"
    wait_until(lambda: it.counted("invalid", "unauthorized") == 4)
    assert gate.batches == []
    gate.open()
    for headers in (
        {"X_API_Key": KEY},
        {**ELSEWHERE, "X_API_Key": KEY},
        {**ELSEWHERE, "Authorization": f"Bearer {KEY}"},
    ):
        assert it.ask(image, **headers).error == ""


def test_a_protected_server_asks_this_machine_for_no_key_where_it_trusts_it(
    start: Start, gate: Gate, encode: Encode
) -> None:
    it = start(api_key=SecretStr(KEY), protect_predict=True, trust_loopback=True)
    gate.open()
    assert it.ask(encode(0)).error == ""
    assert it.ask(encode(0), **ELSEWHERE).error == it.error("unauthorized")


def test_a_protected_server_without_a_key_serves_nobody_where_others_can_reach_it(
    start: Start, gate: Gate, encode: Encode
) -> None:
    it = start(protect_predict=True, host="0.0.0.0")
    gate.open()
    assert it.ask(encode(0)).error == it.error("forbidden")


def test_a_protected_server_without_a_key_serves_this_machine_alone(
    start: Start, gate: Gate, encode: Encode
) -> None:
    it = start(protect_predict=True)
    gate.open()
    refused = it.ask(encode(0), **ELSEWHERE, X_API_Key=KEY)
    assert refused.error == it.error("forbidden")
    assert "without a key only programs on this machine may do this" in refused.detail
    assert it.ask(encode(0), Origin="https://evil.example").error == it.error("forbidden")
    wait_until(lambda: it.counted("invalid", "forbidden") == 2)
    assert it.ask(encode(0)).error == ""


@pytest.mark.parametrize("kind", [Grpc], ids=["v2-grpc"])
def test_a_key_beyond_ascii_is_sent_over_grpc_as_bytes(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(api_key=SecretStr("clé"), protect_predict=True)
    gate.open()
    assert it.ask(encode(0), X_API_Key_bin="clé".encode()).error == ""
    assert it.ask(encode(0), X_API_Key_bin=b"cl").error == it.error("unauthorized")


def test_an_unprotected_server_asks_nobody_for_the_key(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(api_key=SecretStr(KEY))
    gate.open()
    assert it.ask(encode(0), **ELSEWHERE).error == ""


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:203.0.113.9:5000", "203.0.113.9"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:[::1]:5000", "::1"),
        ("unix:", ""),
    ],
)
def test_the_address_of_a_grpc_peer(peer: str, address: str) -> None:
    assert address_of(peer) == address


# --- the priority ---------------------------------------------------------------------------------------


def test_requests_of_low_priority_let_others_go_first(start: Start, gate: Gate, encode: Encode) -> None:
    it = start()
    image = encode(0)
    first = it.send(image)
    gate.wait_for_arrivals(1)
    low = [it.send(image, X_Priority="low") for _ in range(9)]  # one more than a batch
    backlog = it.server.service.registry.get("tiny")._backlog
    wait_until(lambda: backlog.waiting == 9)
    others = [it.send(image, X_Priority="normal"), it.send(image)]
    wait_until(lambda: backlog.waiting == 11)
    gate.allow(2)
    for sent in (first, *others):
        assert sent.answer().error == ""
    gate.wait_for_arrivals(3)
    assert gate.batches == [1, 8, 3]
    gate.open()
    assert [sent.answer().error for sent in low] == [""] * 9


def test_requests_of_low_priority_take_no_room_from_others(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(queue_limit=2)
    image = encode(0)
    low = [it.send(image, X_Priority="low") for _ in range(2)]
    wait_until(lambda: pending(it) == 2)
    assert it.ask(image, X_Priority="low").error == it.error("queue-full")
    others = [it.send(image), it.send(image)]
    wait_until(lambda: pending(it) == 4)
    assert it.ask(image).error == it.error("queue-full")
    gate.open()
    assert [sent.answer().error for sent in (*low, *others)] == [""] * 4


def test_a_priority_is_normal_or_low(start: Start, gate: Gate, encode: Encode) -> None:
    it = start()
    gate.open()
    refused = it.ask(encode(0), X_Priority="highest")
    assert refused.error == it.error("invalid-parameter")
    assert refused.detail == "X-Priority must be normal or low, not 'highest'"


# --- the deadline ---------------------------------------------------------------------------------------


def a_late_request_is_told_so_and_never_computed(it: Carrier, gate: Gate, image: bytes) -> None:
    blocker = it.send(image)
    gate.wait_for_arrivals(1)
    # Long enough for a client that looks at the deadline itself to have sent its request before.
    assert it.ask(image, timeout_ms=500).error == it.error("deadline-exceeded")
    wait_until(lambda: it.counted("expired", "deadline-exceeded") == 1)
    assert dropped(it) == {"expired": 1}
    assert pending(it) == 1
    only_these_are_computed(gate, blocker, it.send(image))


def test_a_request_whose_deadline_passes_is_told_so_and_never_computed(
    start: Start, gate: Gate, encode: Encode
) -> None:
    a_late_request_is_told_so_and_never_computed(start(), gate, encode(0))


@pytest.mark.parametrize("kind", [Grpc], ids=["v2-grpc"])
def test_a_call_that_grpc_cancels_at_its_deadline_is_expired(
    start: Start, gate: Gate, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Admission, "_expire", lambda self: None)  # gRPC comes before it
    a_late_request_is_told_so_and_never_computed(start(), gate, encode(0))


def test_no_client_may_wait_longer_than_the_server_allows(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(timeout_ms=50)
    for timeout_ms in (None, 60_000):
        late = it.ask(encode(0), timeout_ms=timeout_ms)
        assert late.error == it.error("deadline-exceeded")
        assert late.detail == "the deadline passed before the result was there"
    wait_until(lambda: it.counted("expired", "deadline-exceeded") == 2)


@over_http
def test_a_body_that_does_not_come_in_time_is_expired_and_not_invalid(start: Start, kind: type[Http]) -> None:
    it = start()
    assert isinstance(it, Http)
    sent, connection = it.open({"Content-Length": "100"}, timeout_ms=50)
    connection.sendall(b"only this")
    late = sent.answer()
    assert (late.error, late.detail) == ("body-timeout", "the body had not arrived after 0.05 s")
    wait_until(lambda: it.counted("expired", "body-timeout") == 1)


@over_http
def test_the_deadline_counts_from_the_head_whenever_the_body_comes(
    start: Start, gate: Gate, encode: Encode, kind: type[Http]
) -> None:
    it = start()
    assert isinstance(it, Http)
    recorder = _Recorder()
    it.server.service.telemetry.observers = [recorder]
    body = it.body([encode(0)])
    first, connection = it.open(it.head(body), timeout_ms=1000)
    wait_until(lambda: it.server.service.telemetry.in_flight == 1)
    second = it.send_body(body, timeout_ms=1000)
    wait_until(lambda: pending(it) == 1)
    connection.sendall(body)
    wait_until(lambda: pending(it) == 2)
    assert first.answer().error == second.answer().error == "deadline-exceeded"
    began = [request.began for request in recorder.ended]
    assert began == sorted(began), "the second was late before the first"


@over_http
@pytest.mark.parametrize("value", ["0", "-5", "soon", "nan", ""])
def test_a_timeout_that_is_no_positive_number_is_invalid(
    start: Start, kind: type[Http], encode: Encode, value: str
) -> None:
    it = start()
    assert it.ask(encode(0), X_Request_Timeout_Ms=value).error == "invalid-parameter"


# --- a client that leaves -------------------------------------------------------------------------------


def test_a_request_whose_client_leaves_is_never_computed(start: Start, gate: Gate, encode: Encode) -> None:
    it = start()
    image = encode(0)
    blocker = it.send(image)
    gate.wait_for_arrivals(1)
    leaving = it.send(image)
    wait_until(lambda: pending(it) == 2)
    leaving.leave()
    wait_until(lambda: pending(it) == 1)
    assert dropped(it) == {"cancelled": 1}
    wait_until(lambda: it.counted("cancelled", "disconnected") == 1)
    only_these_are_computed(gate, blocker, it.send(image))


@over_http
def test_a_client_that_leaves_amid_its_body_leaves_nothing_behind(start: Start, kind: type[Http]) -> None:
    it = start()
    assert isinstance(it, Http)
    sent, connection = it.open({"Content-Length": "5000"})
    connection.sendall(b"\0" * 100)
    wait_until(lambda: it.server.service.body_memory.held == 100)
    sent.leave()
    wait_until(lambda: it.counted("cancelled", "disconnected") == 1)
    assert it.server.service.body_memory.held == 0


# --- the engine and the room in its queue ---------------------------------------------------------------


def test_an_unknown_engine_is_said(start: Start, encode: Encode) -> None:
    it = start()
    refused = it.ask(encode(0), engine="nobody")
    assert refused.error == it.error("engine-not-found")
    assert refused.detail == "no engine 'nobody' is loaded; loaded: tiny"
    wait_until(lambda: it.counted("invalid", "engine-not-found") == 1)


@pytest.mark.parametrize("seconds", [0.1, 0.4])
def test_a_full_queue_says_when_to_try_again_by_the_measured_rate(
    start: Start, gate: Gate, encode: Encode, seconds: float
) -> None:
    it = start()
    image = encode(0)
    began = time.monotonic()
    sent = it.send(image)
    gate.wait_for_arrivals(1)
    arrived = time.monotonic()
    wait_until(lambda: time.monotonic() - arrived > seconds)  # the time itself that is measured
    gate.allow(1)
    assert sent.answer().error == ""
    least, most = seconds, time.monotonic() - began
    accepted = [it.send(image) for _ in range(QUEUE_LIMIT)]
    wait_until(lambda: pending(it) == QUEUE_LIMIT)
    refused = it.ask(image)
    assert refused.error == it.error("queue-full")
    (said,) = re.findall(r"the limit is 12; try again in (\d+) s", refused.detail)
    assert math.ceil(QUEUE_LIMIT * least) <= int(said) <= math.ceil(QUEUE_LIMIT * most)
    assert refused.headers["retry-after"] == said
    wait_until(lambda: it.counted("rejected", "queue-full") == 1)
    gate.open()
    assert [sent.answer().error for sent in accepted] == [""] * QUEUE_LIMIT


def test_requests_of_many_images_leave_room_for_those_of_one(
    start: Start, gate: Gate, encode: Encode
) -> None:
    it = start()
    image = encode(0)
    forms = [it.send(*[image] * (QUEUE_LIMIT // 2)) for _ in range(2)]
    wait_until(lambda: pending(it) == QUEUE_LIMIT)
    assert it.ask(*[image] * (QUEUE_LIMIT // 2)).error == it.error("queue-full")
    single = it.send(image)
    wait_until(lambda: pending(it) == QUEUE_LIMIT + 1)
    gate.open()
    assert [sent.answer().error for sent in [*forms, single]] == [""] * 3


def test_each_engine_has_a_queue_and_a_rate_of_its_own(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(engine="tiny,other", queue_limit=3)
    image = encode(0)
    slow = it.send(image, engine="other")
    gate.wait_for_arrivals(1)
    arrived = time.monotonic()
    wait_until(lambda: time.monotonic() - arrived > 0.7)  # the time itself that is measured
    gate.allow(1)
    assert slow.answer().error == ""
    said = {}
    for full in ("tiny", "other"):
        accepted = [it.send(image, engine=full) for _ in range(3)]
        wait_until(lambda full=full: pending(it, full) == 3)
        refused = it.ask(image, engine=full)
        assert refused.error == it.error("queue-full")
        said[full] = int(refused.headers["retry-after"])
        free = it.send(image, engine="other" if full == "tiny" else "tiny")
        gate.open()
        assert [sent.answer().error for sent in [free, *accepted]] == [""] * 4
        gate.close()
    assert said["tiny"] == 1 < said["other"]


@over_http
def test_a_full_queue_refuses_before_the_body_has_come(
    start: Start, gate: Gate, encode: Encode, kind: type[Http]
) -> None:
    it = start(engine="other,tiny", queue_limit=1)
    assert isinstance(it, Http)
    first = it.send(encode(0))
    gate.wait_for_arrivals(1)
    refused, _ = it.open({"Content-Length": "1000"})
    assert refused.answer().error == "queue-full"
    gate.open()
    assert first.answer().error == ""


def test_a_request_larger_than_the_free_room_is_not_half_admitted(start: Start, encode: Encode) -> None:
    it = start(queue_limit=2)
    assert it.ask(*[encode(0)] * 3).error == it.error("queue-full")
    assert pending(it) == 0


# --- the body and its images ----------------------------------------------------------------------------


def test_bodies_together_may_not_hold_more_than_their_limit(
    start: Start, gate: Gate, encode: Encode, kind: type[Carrier]
) -> None:
    image = encode(0)
    it = start(max_body_memory_bytes=int(2.5 * len(kind.body([image]))))
    held = [it.send(image), it.send(image)]
    wait_until(lambda: pending(it) == 2)
    refused = it.ask(image)
    assert refused.error == it.error("queue-full")
    assert "request bodies hold" in refused.detail
    wait_until(lambda: it.counted("rejected", "queue-full") == 1)
    gate.open()
    assert [sent.answer().error for sent in held] == ["", ""]
    assert it.ask(image).error == ""


def test_one_body_may_not_be_larger_than_its_limit(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(max_body_bytes=1000)
    gate.open()
    assert it.ask(encode(0)).error == ""
    assert it.ask(encode(0).ljust(1000, b"\0")).error == it.error("body-too-large")


@pytest.mark.parametrize("kind", [Grpc], ids=["v2-grpc"])
def test_a_call_without_a_message_is_malformed(start: Start, kind: type[Grpc]) -> None:
    it = start()
    assert isinstance(it, kind)
    answer = it.send_no_message().answer()
    assert (answer.error, answer.detail) == (
        it.error("malformed-request"),
        "the call ended without a message",
    )
    wait_until(lambda: it.counted("invalid", "malformed-request") == 1)


@over_http
def test_a_body_announced_above_the_limit_is_refused_before_it_comes(start: Start, kind: type[Http]) -> None:
    it = start(max_body_bytes=1000)
    assert isinstance(it, Http)
    sent, _ = it.open({"Content-Length": "1001"})
    assert sent.answer().error == "body-too-large"
    wait_until(lambda: it.counted("invalid", "body-too-large") == 1)


@over_http
def test_a_body_announced_at_the_limit_is_read(start: Start, kind: type[Http]) -> None:
    it = start(max_body_bytes=1000)
    assert isinstance(it, Http)
    sent, connection = it.open({"Content-Length": "1000"})
    connection.sendall(bytes(1000))
    assert sent.answer().error == "malformed-request"


@over_http
def test_a_body_of_unannounced_size_is_stopped_at_the_limit(start: Start, kind: type[Http]) -> None:
    it = start(max_body_bytes=1000)
    assert isinstance(it, Http)
    sent, connection = it.open({"Transfer-Encoding": "chunked"})
    connection.sendall(b"258\r\n" + b"\0" * 600 + b"\r\n258\r\n" + b"\0" * 600 + b"\r\n")
    assert sent.answer().error == "body-too-large"
    wait_until(lambda: it.counted("invalid", "body-too-large") == 1)


@pytest.mark.parametrize("kind", [Predict, Rest], ids=["predict", "v2-rest"])  # ASGI's layers join pieces
def test_a_body_in_very_many_tiny_pieces_is_refused(start: Start, kind: type[Http]) -> None:
    it = start()
    assert isinstance(it, Http)
    sent, connection = it.open({"Transfer-Encoding": "chunked"})
    connection.sendall(b"2\r\nxx\r\n" * 20_000)
    refused = sent.answer()
    assert refused.error == "malformed-request"
    assert refused.detail == "the body has more than 16,384 tiny pieces"


@over_predict
def test_a_body_in_small_pieces_is_put_together(
    start: Start, gate: Gate, encode: Encode, reference: Callable, kind: type[Http]
) -> None:
    it = start()
    assert isinstance(it, Http)
    gate.open()
    sent, connection = it.open({"Transfer-Encoding": "chunked"})
    body = bytes(10_000) + b"\r\n" + it.body([encode(0)])  # what comes before the first part is no part
    connection.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert list(sent.answer().best) == [reference(encode(0)).argmax()]


# --- large requests, which a thread takes apart ---------------------------------------------------------


@pytest.fixture
def large(kind: type[Carrier], encode: Encode) -> Callable[..., bytes]:
    """A body for those images that takes long to take apart, or would if it were not for its limits."""

    def large(*images: bytes) -> bytes:
        body = kind.body(images)
        if issubclass(kind, Predict):
            field = b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\n'
            return field + b"x" * (2 << 20) + b"\r\n" + body
        if issubclass(kind, Rest):
            return body.replace(b'{"inputs"', b'{"notes": [' + b"0," * 100_000 + b'0], "inputs"', 1)
        return body + _UNKNOWN_FIELD * 1_000 + _UNKNOWN_BYTES

    return large


_UNKNOWN_FIELD = b"\xf8\x01\x00"  # of a protobuf message: number 31, a varint
_UNKNOWN_BYTES = b"\xfa\x01\x80\x80\x20" + bytes(512 << 10)  # the same number, bytes


def test_a_large_request_is_answered_as_any_other(
    start: Start, gate: Gate, encode: Encode, reference: Callable, large: Callable[..., bytes]
) -> None:
    it = start()
    gate.open()
    answer = it.send_body(large(encode(0), encode(1))).answer()
    assert answer.error == ""
    assert list(answer.best) == [reference(encode(seed)).argmax() for seed in (0, 1)]


def test_a_large_request_that_is_wrong_is_refused_as_any_other(
    start: Start, large: Callable[..., bytes], encode: Encode
) -> None:
    it = start(max_images=1)
    assert it.send_body(large(encode(0), encode(1))).answer().error == it.error("too-many-images")
    wait_until(lambda: it.counted("invalid", "too-many-images") == 1)


def test_large_requests_whose_clients_leave_keep_nothing(
    start: Start, encode: Encode, large: Callable[..., bytes]
) -> None:
    it = start()
    body = large(encode(0))
    for sent in [it.send_body(body) for _ in range(10)]:
        sent.leave()
    wait_until(lambda: nothing_is_left(it))


def test_the_body_of_a_large_request_counts_as_long_as_the_thread_has_it(
    start: Start, encode: Encode, large: Callable[..., bytes]
) -> None:
    it = start()
    taken = threading.Event()
    large_work, memory = it.server.service.large_work, it.server.service.body_memory
    large_work.submit(taken.wait, 20)  # the thread has other work
    wait_until(lambda: large_work._work_queue.qsize() == 0)  # type: ignore[attr-defined]
    body = large(encode(0))
    sent = it.send_body(body)
    wait_until(lambda: large_work._work_queue.qsize() == 1)  # type: ignore[attr-defined]
    sent.leave()
    wait_until(lambda: it.counted("cancelled", "disconnected") == 1)
    assert memory.held >= len(body)
    taken.set()
    wait_until(lambda: nothing_is_left(it))


def test_a_large_request_may_be_late_while_it_is_taken_apart(
    start: Start, gate: Gate, encode: Encode, large: Callable[..., bytes]
) -> None:
    it = start()
    taken = threading.Event()
    it.server.service.large_work.submit(taken.wait, 20)  # the thread has other work
    try:
        late = it.send_body(large(encode(0)), timeout_ms=300).answer()
    finally:
        taken.set()
    assert late.error == it.error("deadline-exceeded")
    assert late.detail == "the deadline passed before the result was there" or it.protocol == "v2-grpc"
    assert gate.batches == []


def test_a_large_answer_is_rendered_like_any_other(
    start: Start, gate: Gate, encode: Encode, reference: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.admission._LARGE_ANSWER", -1)
    it = start()
    gate.open()
    assert list(it.ask(encode(0)).best) == [reference(encode(0)).argmax()]
    assert it.ask(b"no image").error == it.error("image-damaged")


@over_predict
def test_an_answer_is_large_by_its_images_times_the_classes_of_each(
    start: Start, gate: Gate, encode: Encode, monkeypatch: pytest.MonkeyPatch, kind: type[Http]
) -> None:
    monkeypatch.setattr("server.admission._LARGE_ANSWER", 5)
    it = start()
    gate.open()
    taken = threading.Event()
    large_work = it.server.service.large_work
    large_work.submit(taken.wait, 20)  # the thread has other work
    assert it.ask(encode(0)).error == ""  # five classes
    waits = it.send(encode(0), encode(1))  # ten
    wait_until(lambda: large_work._work_queue.qsize() == 1)  # type: ignore[attr-defined]
    taken.set()
    assert waits.answer().error == ""


@over_predict
def test_an_answer_of_very_many_classes_is_refused(start: Start, kind: type[Http]) -> None:
    it = start(max_images=60_000, queue_limit=60_000, max_body_bytes=64 << 20)
    refused = it.ask(*[b"x"] * 52_500)  # five classes each
    assert refused.error == "invalid-parameter"
    assert "the limit is 262,144 in one answer" in refused.detail


# --- bodies that are wrong ------------------------------------------------------------------------------


def test_a_body_that_cannot_be_parsed_is_malformed(start: Start) -> None:
    it = start()
    assert it.send_body(b"\xff\xff\xff\xff").answer().error == it.error("malformed-request")
    assert it.send_body(b"\xff" * 10_000).answer().error == it.error("malformed-request")
    wait_until(lambda: it.counted("invalid", "malformed-request") == 2)


def test_more_images_than_the_limit_are_refused(start: Start, gate: Gate, encode: Encode) -> None:
    it = start(max_images=2)
    gate.open()
    refused = it.ask(*[encode(0)] * 3)
    assert (refused.error, refused.detail) == (
        it.error("too-many-images"),
        "too many images; the limit is 2 in one request",
    )
    wait_until(lambda: it.counted("invalid", "too-many-images") == 1)
    assert it.ask(*[encode(0)] * 2).error == ""


def test_a_damaged_image_is_the_clients_fault(start: Start, gate: Gate) -> None:
    it = start()
    gate.open()
    assert it.ask(b"no image").error == it.error("image-damaged")
    wait_until(lambda: it.counted("invalid", "image-damaged") == 1)


# --- the outcome ----------------------------------------------------------------------------------------


def test_an_engine_that_fails_is_the_servers_fault(start: Start, gate: Gate, encode: Encode) -> None:
    it = start()
    gate.fail_next = True
    gate.allow(1)
    failed = it.ask(encode(0))
    assert failed.error == it.error("inference-failed")
    assert "the device fell off" in failed.detail
    wait_until(lambda: it.counted("failed", "inference-failed") == 1)
    gate.open()
    assert it.ask(encode(0)).error == ""


@pytest.mark.parametrize("images", [1, 5], ids=["at once", "in its turn"])
def test_an_answer_that_cannot_be_rendered_is_the_servers_fault(
    start: Start, gate: Gate, encode: Encode, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    it = start()
    gate.open()

    def fail(*_arguments: object) -> None:
        raise RuntimeError("no such label")

    for call in ("server.exchange.PredictCall", "server.v2.rest.InferCall", "server.v2.grpc_call.InferCall"):
        monkeypatch.setattr(f"{call}.render", fail)
    failed = it.ask(*[encode(0)] * images)
    assert failed.error == it.error("internal-error")
    assert "no such label" not in failed.detail
    wait_until(lambda: it.counted("failed", "internal-error") == 1)


@pytest.mark.parametrize("kind", [Predict, Rest], ids=["predict", "v2-rest"])
def test_a_request_whose_answer_cannot_be_written_has_ended_all_the_same(
    start: Start, gate: Gate, encode: Encode, monkeypatch: pytest.MonkeyPatch, kind: type[Http]
) -> None:
    it = start()
    gate.open()
    monkeypatch.setattr("server.connection.STATUS_LINE", {})
    it.send(encode(0))
    wait_until(lambda: it.counted("ok", "") == 1)


@over_http
def test_server_timing_is_the_slowest_images(
    start: Start, gate: Gate, encode: Encode, kind: type[Http]
) -> None:
    it = start()
    began = time.monotonic()
    sent = it.send(*[encode(0)] * 9)  # more than the largest batch
    gate.wait_for_arrivals(1)
    admitted = time.monotonic()
    gate.allow(1)
    gate.wait_for_arrivals(2)
    wait_until(lambda: pending(it) < 9)
    fastest = time.monotonic() - began
    wait_until(lambda: time.monotonic() - admitted > 2 * fastest)
    slowest = time.monotonic() - admitted
    gate.open()
    answer = sent.answer()
    timing = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert float(timing["total"]) / 1000 >= slowest > fastest


class _Recorder:
    """A `RequestObserver` that fails after each record."""

    def __init__(self) -> None:
        self.ended: list[Ended] = []

    def record(self, request: Ended) -> None:
        self.ended.append(request)
        raise RuntimeError("the exporter is gone")

    def close(self) -> None:
        pass


def test_every_observer_is_told_how_each_request_ended_and_may_fail(
    start: Start, gate: Gate, encode: Encode
) -> None:
    it = start()
    gate.open()
    recorder = _Recorder()
    it.server.service.telemetry.observers = [recorder, recorder]
    began = time.monotonic()
    assert it.ask(encode(0), encode(1), traceparent="00-1-2-03").error == ""
    assert it.ask(encode(0), engine="nobody").error == it.error("engine-not-found")
    wait_until(lambda: len(recorder.ended) == 4)
    answered, refused = recorder.ended[::2]
    assert answered.key == (it.protocol, "ok", "")
    assert answered.caller().headers["traceparent"] == "00-1-2-03"
    assert began < answered.began < answered.results[0].admitted
    assert answered.manifest is not None
    assert answered.manifest.name == "tiny"
    assert len(answered.results) == 2
    assert refused.key == (it.protocol, "invalid", "engine-not-found")
    assert (refused.manifest, refused.results) == (None, ())
