"""How long a connection waits for its client: for a request, for its head, for what follows an answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from server.deadline import Deadline

LINGER_S: Final = 30.0
"""How long the rest of a request is read that was answered before its end, seconds."""
LINGER_QUIET_S: Final = 5.0
"""The same while nothing comes, seconds."""
LINGER_BYTES: Final = 1 << 30
"""How much of it is read."""


class Patience(Deadline):
    """The deadline by which a client must have sent, or read, what it is waited for.

    Args:
        loop: whose clock counts.
        reached: called when it has passed.
        keep_alive: seconds to wait for a request; 0: no time after an answer.
        timeout: seconds that a request may take.

    Attributes:
        head_s: seconds in which a head must be there.
        unread_s: seconds in which a client must read what it was sent.
    """

    __slots__ = ("_keep_alive", "_latest", "_read", "head_s", "unread_s")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, reached: Callable[[], None], keep_alive: float, timeout: float
    ) -> None:
        super().__init__(loop, reached)
        self._keep_alive = keep_alive
        self.head_s = min(keep_alive or math.inf, timeout)
        self.unread_s = keep_alive or self.head_s
        self._latest = 0.0  # until when the head, or the rest of an answered request, must be there
        self._read = 0  # bytes of that rest

    def begin(self) -> None:
        """Something else is waited for from now on, however long the last took."""
        self._latest = 0.0

    def await_first(self) -> None:
        """Wait for the first request of a connection."""
        self.move(self._loop.time() + self.unread_s)

    def await_request(self) -> None:
        """Wait for another request."""
        self.move(self._loop.time() + self._keep_alive)

    def await_head(self) -> None:
        """Wait for the rest of a head; it is not waited for any longer when more of it comes."""
        self._latest = self._latest or self._loop.time() + self.head_s
        self.move(self._latest)

    def await_rest(self, size: int) -> None:
        """Wait for the rest of a request that is answered, of which `size` bytes have just come."""
        now = self._loop.time()
        if not self._latest:
            self._latest = now + LINGER_S
            self._read = 0
        self._read += size
        too_much = self._read > LINGER_BYTES
        self.move(now if too_much else min(self._latest, now + LINGER_QUIET_S))
