"""How threads that compute on CPUs share the cores with a process's other threads, as Linux lets them.

Without it a server does the same with less throughput and longer tails (benchmarks/NOTES.md has figures).
`--no-linux-scheduling` turns it off; on other systems it is never on.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_NICER: Final = 10
_SLICE_NS: Final = 100_000_000  # the most that Linux allows
_SWITCH_SECONDS: Final = 1e-3
_PR_SET_TIMERSLACK: Final = 29
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}


@contextmanager
def giving_way() -> Iterator[None]:
    """Let all other threads run before the calling one, which computes, until the block ends.

    Without it, the event loop and clients on this machine often wait for a core, and so does the thread that
    holds the interpreter's lock while others wait for that lock.

    In return, every thread of the process hands the lock over after 1 ms instead of 5: the calling thread
    needs it for moments only, and its core would idle until the event loop has answered a whole batch. After
    less, threads of fast engines would take the lock from each other all the time.

    The end of the block undoes everything, except that only a privileged process may raise a thread's
    priority again. On other systems than Linux nothing happens.
    """
    if sys.platform == "linux":
        with _short_switch_interval, _low_priority():
            yield
    else:
        yield


class _ShortSwitchInterval:
    """A short switch interval of the interpreter while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(_SWITCH_SECONDS)
            self._inside += 1

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                sys.setswitchinterval(self._before)


_short_switch_interval = _ShortSwitchInterval()


@contextmanager
def _low_priority() -> Iterator[None]:
    """Priority, scheduling class and timers of the calling thread."""
    thread = threading.get_native_id()
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    # Linux lengthens timed waits by 50 us, to wake several threads at once.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    with suppress(OSError):  # some sandboxes refuse
        # Relative to the main thread: this one may still be at the lower priority of an engine before.
        lower = min(19, os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICER)
        os.setpriority(os.PRIO_PROCESS, thread, lower)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        _set_slice(os.SCHED_BATCH, lower, _SLICE_NS)
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 0, 0, 0, 0)
        with suppress(OSError):
            _set_slice(os.SCHED_BATCH, os.getpriority(os.PRIO_PROCESS, thread), 0)
            os.sched_setscheduler(0, policy, parameters)
            os.setpriority(os.PRIO_PROCESS, thread, nice)


def _set_slice(policy: int, nice: int, nanoseconds: int) -> None:
    """Set the calling thread's time slice; 0: the default.

    No thread with a shorter slice waits for the end of a longer one (since Linux 6.12; older kernels
    ignore it). The attributes are `struct sched_attr` of sched_setattr(2), its first version, for which
    neither Python nor every C library has a function.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        size, flags, priority, deadline, period = 48, 0, 0, 0, 0
        attributes = struct.pack(
            "=IIQiIQQQ", size, policy, flags, nice, priority, nanoseconds, deadline, period
        )
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)
