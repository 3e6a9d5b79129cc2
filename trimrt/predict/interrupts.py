"""Ctrl-C where threads work for the main one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Until the block ends, a Ctrl-C is raised only where the block calls what this yields, and at its end.

    Python raises `KeyboardInterrupt` between any two instructions of the main thread: also when it has just
    acquired the lock of a `Future` or a semaphore, which is then never released, and another thread waits for
    it for ever. A second Ctrl-C is raised at once all the same.
    """
    interrupted = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check  # Ctrl-C is ignored, or somebody else's
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()
