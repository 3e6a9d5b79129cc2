"""gRPC's messages on their way in.

gRPC tells a message's size only when all of it is there, and holds it twice while it hands it over. So only
a few come in at once, and the most that they may hold counts among the request bodies. All others wait in the
network, where nothing is held for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from server.bodies import BodyMemory
from server.problems import Problem

_PATIENCE_S: Final = 5.0  # for a message, while it takes the last place


class Intake:
    """Places for messages that are being received.

    Args:
        memory: what all bodies share; at most half of it is for messages that come in.
        largest: bytes of the largest message.
    """

    def __init__(self, memory: BodyMemory, largest: int) -> None:
        places = max(1, memory.limit // (4 * largest))
        self._memory = memory
        self._each = max(1, min(2 * largest, memory.limit // 2 // places))
        self._places = asyncio.Semaphore(places)

    async def receive(self, read: Callable[[], Awaitable[object]]) -> bytes:
        """The message that `read` reads, once there is a place for it.

        Raises:
            Problem: `queue-full`, `body-timeout`, or `malformed-request` if there is no message.
        """
        async with self._places:
            held = self._memory.reserve_up_to(self._each)
            reading = asyncio.ensure_future(read())
            try:
                while not (await asyncio.wait({reading}, timeout=_PATIENCE_S))[0]:
                    if self._places.locked():
                        raise Problem(
                            "body-timeout",
                            f"the message had not arrived after {_PATIENCE_S:g} s, and others wait",
                        )
                message = reading.result()
            finally:
                reading.cancel()
                self._memory.release(held)
        if not isinstance(message, bytes):
            raise Problem("malformed-request", "the call ended without a message")
        return message
