"""gRPC's messages on their way in.

gRPC tells a message's size only when all of it is there. So only a few come in at once, and the most that
they may hold counts among the request bodies. The others wait in the network, where nothing is held for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from server.bodies import BodyMemory
from server.problems import Problem

_COPIES: Final = 3  # of a message: two while gRPC hands it over, and another while it is parsed
_PATIENCE_S: Final = 2.0


class Intake:
    """Places for messages that are being received.

    Args:
        memory: what all bodies share; half of it is for messages that come in.
        largest: bytes of the largest message.
    """

    def __init__(self, memory: BodyMemory, largest: int) -> None:
        places = max(1, memory.limit // 2 // (_COPIES * largest))
        self._memory = memory
        self._each = max(1, memory.limit // 2 // places)
        self._places = asyncio.Semaphore(places)
        self._waiting = 0

    async def receive(self, read: Callable[[], Awaitable[object]]) -> bytes:
        """The message that `read` reads, once there is a place for it.

        A message that takes long to come is given up as soon as others wait for its place.

        Raises:
            Problem: `queue-full`, `body-timeout`, or `malformed-request` if there is no message.
        """
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        held = 0
        reading: asyncio.Future[object] | None = None
        try:
            held = self._memory.reserve_up_to(self._each)
            reading = asyncio.ensure_future(read())
            while not (await asyncio.wait([reading], timeout=_PATIENCE_S))[0]:
                if self._waiting:
                    raise Problem(
                        "body-timeout",
                        f"the message had not arrived after {_PATIENCE_S:g} s, and others wait",
                    )
            message = reading.result()
        finally:
            if reading is not None:
                reading.cancel()
            self._memory.release(held)
            self._places.release()
        if not isinstance(message, bytes):
            raise Problem("malformed-request", "the call ended without a message")
        return message
