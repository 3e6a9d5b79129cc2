"""A deadline that moves often and is rarely reached: one timer for many requests."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Deadline:
    """Calls `reached` once `until` has passed.

    To lift the deadline, set `until` to infinity; that costs nothing.

    Attributes:
        until: a time of the loop's clock.
    """

    __slots__ = ("_loop", "_reached", "_timer", "_timer_at", "until")

    def __init__(self, loop: asyncio.AbstractEventLoop, reached: Callable[[], None]) -> None:
        self.until = math.inf
        self._loop = loop
        self._reached = reached
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def move(self, until: float) -> None:
        """Set `until`, and see that it is noticed."""
        self.until = until
        if self._timer is None or self._timer_at > until:
            self.cancel()
            self._timer_at = until
            self._timer = self._loop.call_at(until, self._look)

    def cancel(self) -> None:
        """End the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self.until <= self._loop.time():
            self._reached()
        elif self.until < math.inf:
            self.move(self.until)
