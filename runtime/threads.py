"""Threads that run engines; they are reused and never end.

A runtime may keep state of its own for every thread that has used it. OpenVINO frees that state when
the thread ends, which happens a little after Python has joined it, and corrupts memory if the engine
is being freed at that very moment. A thread that goes on to the next engine never comes to that.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import struct
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
_SLICE_NS: Final = 100_000_000  # the most that Linux allows
_SWITCH_SECONDS: Final = 20e-6
_PR_SET_TIMERSLACK: Final = 29
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}

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
    """Let all other threads run before the calling one, which computes, and never stop them for it.

    Otherwise the event loop and clients on this machine often wait for a processor, and threads that need the
    interpreter's lock wait for a thread that holds it and waits for a processor.

    In return, whoever holds the interpreter's lock hands it over soon: the calling thread needs it for
    moments only, for which its core would be idle until the event loop has answered a whole batch.

    On other systems than Linux only that changes.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    if sys.platform == "linux":
        # Linux lets a thread that waits for a time wait 50 us longer, to wake several at once.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        with suppress(OSError):  # some sandboxes
            main_thread = os.getpriority(os.PRIO_PROCESS, os.getpid())
            nice = min(19, main_thread + _NICER)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            _set_slice(nice)


def _set_slice(nice: int) -> None:
    """Ask for the longest time slice, whose end no thread with a shorter one waits for (since Linux 6.12).

    Older kernels pay no heed. The attributes are `struct sched_attr` of sched_setattr(2), its first version,
    for which neither Python nor every C library has a function.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        size, flags, priority, deadline, period = 48, 0, 0, 0, 0
        attributes = struct.pack(
            "=IIQiIQQQ", size, os.SCHED_BATCH, flags, nice, priority, _SLICE_NS, deadline, period
        )
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


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
