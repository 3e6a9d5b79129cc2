"""The event loop comes before threads that decode images of large requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from running import wait_until

from models.preprocessing import Preprocessing
from runtime.batching import SMALL
from server import decoding_limits
from server.decoding import Decoder
from server.decoding_limits import DecodingLimits, Precedence
from server.jobs import Image, Job
from server.settings import Settings


def test_who_gives_way_waits_until_the_event_loop_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_limits, "_GIVE_WAY_S", 60)
    precedence = Precedence()
    with ThreadPoolExecutor(1) as pool:
        with precedence:
            begun = threading.Event()
            waits = pool.submit(lambda: (begun.set(), precedence.give_way()))
            begun.wait(timeout=20)
            assert not waits.done()
        waits.result(timeout=20)


def test_who_gives_way_goes_on_after_a_moment_however_much_the_event_loop_has_to_do() -> None:
    precedence = Precedence()
    with precedence, ThreadPoolExecutor(1) as pool:
        pool.submit(precedence.give_way).result(timeout=20)


def test_the_event_loop_does_not_wait_for_a_thread_that_lost_its_core_while_it_gave_way() -> None:
    precedence = Precedence()

    def enter() -> None:
        with precedence:
            pass

    precedence._lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        entered = pool.submit(enter)
        try:
            entered.result(timeout=20)
        finally:
            precedence._lock.release()


def test_images_of_large_requests_give_way_and_those_of_small_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, encode: Callable[..., bytes]
) -> None:
    monkeypatch.setattr(decoding_limits, "_GIVE_WAY_S", 60)
    decoder = Decoder(Preprocessing(resize=8, height=8, width=8), DecodingLimits(Settings()))

    def image(count: int) -> Image:
        now = time.monotonic()
        return Image(Job(count, now, now + 60, lambda _outcome: None, 1), 0, encode(0))

    with ThreadPoolExecutor(1) as pool:
        with decoder.limits.precedence:
            pool.submit(decoder.decode, image(SMALL)).result(timeout=20)
            large = image(SMALL + 1)
            admitted = large.decoding
            waits = pool.submit(decoder.decode, large)
            wait_until(waits.running)
            assert large.decoding == admitted
            assert not waits.done()
            left = time.monotonic()
        waits.result(timeout=20)
    assert large.decoding >= left


def test_the_event_loop_never_waits_for_who_gives_way() -> None:
    precedence, over, times = Precedence(), threading.Event(), 0

    def give_way() -> None:
        nonlocal times
        while not over.is_set():
            precedence.give_way()
            times += 1

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(give_way)
        wait_until(lambda: times > 100)
        for _ in range(1000):
            began = time.thread_time()
            with precedence, precedence:  # a request that ends within another's turn
                pass
            assert time.thread_time() - began < 0.1
        over.set()
    with precedence:
        pass
    precedence.give_way()
