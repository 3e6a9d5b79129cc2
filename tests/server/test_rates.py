"""The rate of each key: who has one, what is refused beyond it, and who is not affected."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from carriers import Carrier, Grpc, carrier
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from running import running, wait_until
from streaming import stream

from server.problems import Problem
from server.rates import RateLimit
from server.settings import Settings

Encode = Callable[..., bytes]
Start = Callable[..., Carrier]

SLOW = 0.01  # images a second: what is taken out does not flow back while a test runs


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# the gate's camera\ngate\n\nhall\n")
    return file


@pytest.fixture
def start(
    kind: type[Carrier], engine_dir: Path, keys: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Start]:
    """A server with keys for clients, and a client of `kind`."""
    caplog.set_level(logging.INFO, "trimrt.grpc")
    with ExitStack() as stack:

        def start(**chosen: object) -> Carrier:
            options = {"engine": "tiny", "engine_dir": engine_dir, "port": 0, "client_keys": keys, **chosen}
            server = stack.enter_context(running(Settings(**options, grpc_port=0 if kind is Grpc else None)))
            ports = [int(log.grpc.rpartition(":")[2]) for log in caplog.records if hasattr(log, "grpc")]
            return stack.enter_context(carrier(kind, server, *ports or [0]))

        yield start


def test_a_key_that_asks_for_too_much_is_refused_and_no_other(start: Start, encode: Encode) -> None:
    it = start(rate_limit=SLOW, api_key=SecretStr("manager"))
    callers = [{"X_API_Key": key} for key in ("gate", "hall", "manager")] + [{}]
    for caller in callers:
        assert it.ask(encode(0), **caller).error == ""
        refused = it.ask(encode(0), **caller)
        assert refused.error == it.error("rate-limited")
        assert 90 <= int(refused.headers["retry-after"]) <= 100
    wait_until(lambda: it.counted("rejected", "rate-limited") == len(callers))


def test_all_who_have_no_key_share_one_rate(start: Start, encode: Encode) -> None:
    it = start(rate_limit=SLOW)
    assert it.ask(encode(0), X_API_Key="made up").error == ""
    for caller in ({}, {"X_API_Key": "another"}):
        assert it.ask(encode(0), **caller).error == it.error("rate-limited")


def test_each_image_of_a_request_counts(start: Start, encode: Encode) -> None:
    it = start(rate_limit=SLOW)
    assert it.ask(encode(0), encode(1), encode(2)).error == ""
    assert 250 <= int(it.ask(encode(0)).headers["retry-after"]) <= 300


def test_what_is_answered_from_the_cache_counts_too(start: Start, encode: Encode) -> None:
    it = start(rate_limit=SLOW, cache_mib=1)
    assert it.ask(encode(0), X_API_Key="gate").error == ""
    assert it.ask(encode(0), X_API_Key="hall").error == ""
    assert it.ask(encode(0), X_API_Key="hall").error == it.error("rate-limited")


def test_a_clients_key_lets_in_where_inference_is_protected(start: Start, encode: Encode) -> None:
    it = start(api_key=SecretStr("manager"), protect_predict=True)
    for key, error in (("gate", ""), ("manager", ""), ("made up", "unauthorized"), ("", "unauthorized")):
        assert it.ask(encode(0), X_API_Key=key).error == (error and it.error(error))


def test_a_clients_key_manages_nothing(engine_dir: Path, keys: Path) -> None:
    settings = {"engine": "tiny", "engine_dir": engine_dir, "port": 0, "client_keys": keys}
    with running(Settings(**settings, api_key=SecretStr("manager"))) as it:
        for key, status in (("gate", 401), ("manager", 200)):
            answer = it.client.post("/engines/tiny/load", headers={"X-API-Key": key})
            assert answer.status_code == status


def test_a_frame_beyond_the_rate_is_told_so_and_the_stream_goes_on(
    engine_dir: Path, keys: Path, encode: Encode
) -> None:
    settings = {"engine": "tiny", "engine_dir": engine_dir, "port": 0, "client_keys": keys}
    with (
        running(Settings(**settings, rate_limit=SLOW)) as it,
        stream(it, protocols=["trimrt.key.Z2F0ZQ"]) as live,
    ):
        assert "results" in live.ask(encode(0))
        for number in (1, 2):
            answer = live.ask(encode(0))
            assert (answer["type"], answer["frame"]) == ("urn:trimrt:problem:rate-limited", number)
        assert "results" in it.predict(encode(0)).json()


@pytest.mark.parametrize("text", ["", "# none\n", "gr\u00fcn\n", None])
def test_a_file_without_keys_that_can_be_sent_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text, "utf-8")
    with pytest.raises(ValidationError, match="client_keys"):
        Settings(client_keys=file)


@given(st.floats(0.1, 1000), st.lists(st.tuples(st.floats(0, 5), st.integers(1, 64)), max_size=50))
def test_a_key_is_let_in_up_to_its_rate_and_a_burst_and_when_it_was_told(
    per_second: float, requests: list[tuple[float, int]]
) -> None:
    now, taken = 0.0, 0
    limit = RateLimit(per_second, clock=lambda: now)
    for pause, images in requests:
        now += pause
        try:
            limit.take(b"key", images)
        except Problem as refusal:
            now += int(refusal.headers["Retry-After"]) + 1e-6
            limit.check(b"key")
        else:
            assert taken <= per_second * (now + 1) + 1e-6
            taken += images
    limit.take(b"another", 1)
