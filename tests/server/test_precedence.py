"""The event loop comes before threads that decode images of large requests."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from running import wait_until

from server import decoding_limits
from server.decoding_limits import Precedence


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
