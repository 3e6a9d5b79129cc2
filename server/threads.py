"""Threads that run engines; they are reused and never end.

A runtime may keep state of its own for every thread that has used it. OpenVINO frees that state when
the thread ends, which happens a little after Python has joined it, and corrupts memory if the engine
is being freed at that very moment. A thread that goes on to the next engine never comes to that.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

_Task = Callable[[], None]
_Result = TypeVar("_Result")

_idle: list[SimpleQueue[_Task]] = []  # of every thread that waits; a list's append and pop are atomic


async def run_in_engine_thread(function: Callable[[], _Result]) -> _Result:
    """Run `function` on a thread of its own until it returns; its result, or what it raised."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_work, args=(inbox,), name="trimrt-engine", daemon=True).start()
    inbox.put(partial(_run, function, loop, future))
    return await future


def _work(inbox: SimpleQueue[_Task]) -> None:
    while True:
        inbox.get()()
        _idle.append(inbox)


def _run(
    function: Callable[[], _Result], loop: asyncio.AbstractEventLoop, future: asyncio.Future[_Result]
) -> None:
    try:
        result = function()
    except Exception as error:
        loop.call_soon_threadsafe(_settle, future, None, error)
    else:
        loop.call_soon_threadsafe(_settle, future, result, None)


def _settle(future: asyncio.Future[_Result], result: _Result | None, error: Exception | None) -> None:
    if future.done():
        return  # whoever waited was cancelled
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)  # type: ignore[arg-type]
