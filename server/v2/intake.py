"""gRPC's messages on their way in.

gRPC tells a message's size only when all of it is there. So only a few come in at once, and the most that
they may hold counts among the request bodies. The others wait in the network, where nothing is held for them.
Messages are smaller than bodies over HTTP may be, or one of them would take the place of all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from server.bodies import BodyMemory
from server.problems import Problem

_MESSAGE: Final = 32  # part of the bodies' memory that one message may take
_PLACES: Final = 4  # of such messages
_LEAST: Final = 4 << 20  # bytes that a message may always have: gRPC's own default
_PATIENCE_S: Final = 2.0  # for a message that others wait for; the more of them, the less
_LEAST_PATIENCE_S: Final = 0.1


class Intake:
    """Places for messages that are being received.

    Args:
        memory: what all bodies share; three quarters of it are for messages that come in, while they do.
        max_body: bytes of the largest body.

    Attributes:
        largest: bytes of the largest message.
    """

    def __init__(self, memory: BodyMemory, max_body: int) -> None:
        self.largest = min(max_body, max(_LEAST, memory.limit // _MESSAGE))
        places = max(1, _PLACES * memory.limit // (_MESSAGE * self.largest))
        self._memory = memory
        # One message at a time is handed over by gRPC and one is parsed, which takes eight of its size.
        self._each = max(1, memory.limit * 3 // 4 // places)
        self._most = places
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
            while not (await asyncio.wait([reading], timeout=self._patience()))[0]:
                if self._waiting:
                    raise Problem("body-timeout", "the message takes long to arrive, and others wait")
            message = reading.result()
        finally:
            if reading is not None:
                # Not cancelled: gRPC would never free a message that is just there. It ends with its call.
                reading.add_done_callback(_forget)
            self._memory.release(held)
            self._places.release()
        if not isinstance(message, bytes):
            raise Problem("malformed-request", "the call ended without a message")
        return message

    def _patience(self) -> float:
        """Seconds that a message may take which others wait for."""
        return max(_LEAST_PATIENCE_S, _PATIENCE_S / (1 + self._waiting / self._most))


def _forget(reading: asyncio.Future[object]) -> None:
    """Drop what came of it, which nobody waits for any more."""
    if not reading.cancelled():
        reading.exception()
