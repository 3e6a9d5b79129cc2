"""Where the server stands between start and stop: loading, serving, draining, refusing."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from server.problems import Problem

_MALLOC: Final = {  # of mallopt(3)
    -3: 1 << 20,  # M_MMAP_THRESHOLD: blocks of so many bytes have pages of their own
    -1: 4 << 20,  # M_TRIM_THRESHOLD: the most that may be free at the end of a thread's memory
}


@dataclass
class Lifecycle:
    """One flag a step; none is ever taken back.

    Attributes:
        loaded: every engine named at the start is loaded and warm.
        draining: a stop was asked for; readiness is off, and connections are not kept alive.
        refusing: new inference requests are turned away.
    """

    loaded: bool = False
    draining: bool = False
    refusing: bool = False

    def check_ready(self) -> None:
        """Raise the problem `not-ready` unless new work is wanted."""
        if not self.loaded:
            raise Problem("not-ready", "the engines are still loading", headers={"Retry-After": "1"})
        if self.draining:
            raise Problem("not-ready", "the server is draining")

    def check_serving(self) -> None:
        """Raise the problem `not-ready` if new inference requests are turned away."""
        if self.refusing:
            raise Problem("not-ready", "the server is draining", headers={"Retry-After": "1"})


def settle_memory() -> None:
    """Prepare the memory of a process that is about to serve for many requests.

    Garbage collections stop every thread, so they become rare. And what large requests took goes back to the
    system: glibc would keep ever more of it, for each thread, among small blocks that are still used.
    """
    # Everything allocated so far is permanent: to look through it would take 40 ms now and then.
    gc.collect()
    gc.freeze()
    # The images of a few large requests are no reason for a collection, which takes a millisecond.
    gc.set_threshold(10_000, 10, 10)
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            for parameter, value in _MALLOC.items():
                ctypes.CDLL(None).mallopt(parameter, value)
