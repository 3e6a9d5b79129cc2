"""Child processes that are killed, as `kill -9` or the kernel does when memory runs out."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


def killed_at_line(number: int, file: str, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed before it executes a line of `file` for the `number`th time.

    Returns:
        Whether it was killed; False: it ended before.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != file:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        action()

    return _end_of(_fork(traced))


def kill_after(seconds: float, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed after that time.

    Returns:
        Whether it was killed; False: it ended before.
    """
    child = _fork(action)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return _end_of(child)


def seconds_of(action: Callable[[], object]) -> float:
    """How long a child takes for `action`, from before it is born until after it ended."""
    began = time.perf_counter()
    assert not _end_of(_fork(action)), "it was killed"
    return time.perf_counter() - began


def _fork(action: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)


def _end_of(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "it failed"
    return os.WIFSIGNALED(status)
