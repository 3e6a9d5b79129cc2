"""Threads that run engines."""

from __future__ import annotations

import asyncio
import threading

import pytest

from runtime.threads import EngineThread, run_in_engine_thread, start_in_engine_thread


def test_a_function_runs_on_another_thread_and_its_result_comes_back() -> None:
    assert asyncio.run(run_in_engine_thread(threading.get_ident)) != threading.get_ident()


def test_what_a_function_raises_comes_back() -> None:
    with pytest.raises(ZeroDivisionError):
        start_in_engine_thread(lambda: 1 // 0).result(timeout=20)


def test_threads_never_end_and_are_used_again() -> None:
    before = {thread.ident for thread in threading.enumerate() if thread.name == "trimrt-engine"}
    start = threading.Barrier(8)

    def work() -> int:
        start.wait(20)
        return threading.get_ident()

    runs = [start_in_engine_thread(work) for _ in range(8)]
    threads = {run.result(timeout=20) for run in runs}
    assert len(threads) == 8
    alive = {thread.ident for thread in threading.enumerate() if thread.name == "trimrt-engine"}
    assert alive == before | threads
    assert start_in_engine_thread(threading.get_ident).result(timeout=20) in alive


def test_calls_of_an_engine_thread_run_on_one_thread_in_their_order() -> None:
    thread = EngineThread()
    called: list[int] = []
    idents = {thread.submit(threading.get_ident).result(timeout=20)}
    for number in range(100):
        thread.submit(lambda number=number: called.append(number))
    idents.add(thread.submit(threading.get_ident).result(timeout=20))
    thread.close()
    assert len(idents) == 1
    assert called == list(range(100))
