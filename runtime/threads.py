"""Threads that run engines; they are reused and never end.

A runtime may keep state for every thread that has used it. OpenVINO frees that state when the thread ends,
which happens a little after Python has joined it, and corrupts memory if the engine is being freed at that
moment. A thread that never ends avoids this.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

_Task = Callable[[], None]
_Result = TypeVar("_Result")

# The inbox of every thread that waits for a function; a list's `append` and `pop` are atomic.
_idle: list[SimpleQueue[_Task]] = []


async def run_in_engine_thread(function: Callable[[], _Result]) -> _Result:
    """Run `function` on an engine thread; its result, or what it raised."""
    return await asyncio.wrap_future(start_in_engine_thread(function))


def start_in_engine_thread(function: Callable[[], _Result]) -> Future[_Result]:
    """Run `function` on an engine thread, for callers without an event loop."""
    future: Future[_Result] = Future()
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_work, args=(inbox,), name="trimrt-engine", daemon=True).start()
    inbox.put(partial(_run, function, future))
    return future


class EngineThread:
    """One engine thread for several calls, one after the other."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._ended = start_in_engine_thread(self._run)

    def submit(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Run `function` once those submitted before have returned."""
        future: Future[_Result] = Future()
        self._tasks.put(partial(_run, function, future))
        return future

    def close(self) -> None:
        """Wait until all calls have returned, and release the thread."""
        self._tasks.put(None)
        self._ended.result()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def _work(inbox: SimpleQueue[_Task]) -> None:
    while True:
        inbox.get()()
        _idle.append(inbox)


def _run(function: Callable[[], _Result], future: Future[_Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
