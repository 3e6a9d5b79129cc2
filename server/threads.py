"""Threads that run engines; they are reused and never end.

A runtime may keep state of its own for every thread that has used it. OpenVINO frees that state when
the thread ends, which happens a little after Python has joined it, and corrupts memory if the engine
is being freed at that very moment. A thread that goes on to the next engine never comes to that.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Final, TypeVar

_Task = Callable[[], None]
_Result = TypeVar("_Result")

_NICER: Final = 10

_idle: list[SimpleQueue[_Task]] = []  # of every thread that waits; a list's append and pop are atomic


async def run_in_engine_thread(function: Callable[[], _Result]) -> _Result:
    """Run `function` on a thread of its own until it returns; its result, or what it raised."""
    return await asyncio.wrap_future(start_in_engine_thread(function))


def start_in_engine_thread(function: Callable[[], _Result]) -> Future[_Result]:
    """The same for a caller without event loop: what is returned has the result once it is there."""
    future: Future[_Result] = Future()
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_work, args=(inbox,), name="trimrt-engine", daemon=True).start()
    inbox.put(partial(_run, function, future))
    return future


class EngineThread:
    """One such thread for several calls, one after the other."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._ended = start_in_engine_thread(self._run)

    def submit(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Run `function` when those before it have; what is returned has the result once it is there."""
        future: Future[_Result] = Future()
        self._tasks.put(partial(_run, function, future))
        return future

    def close(self) -> None:
        """Let the thread go, once all calls have returned."""
        self._tasks.put(None)
        self._ended.result()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def give_way() -> None:
    """Let the process's other threads run before the calling one, which computes, and never stop them for it.

    Otherwise the event loop often waits for a processor, and threads that need the interpreter's lock wait
    for a thread that holds it and waits for a processor. On other systems than Linux nothing changes.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # some sandboxes
            nice = os.getpriority(os.PRIO_PROCESS, os.getpid())  # the main thread's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, nice + _NICER))
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


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
