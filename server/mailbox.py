"""Calls that other threads leave for the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_WAKINGS: Final = 4096  # read at once


class Mailbox:
    """What `call_soon_threadsafe` does, for threads that compute on every core.

    uvloop wakes its thread through an eventfd. Of one who writes to a socket Linux expects that it is about
    to sleep, and runs the event loop on its core (since 6.13, with epoll), where a batch is done, and not on
    one where another computes.

    Args:
        loop: runs the calls; the mailbox is made and closed on its thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        loop.add_reader(self._reader, self._empty)

    def leave(self, call: Callable[[], None]) -> None:
        """Have the event loop make `call`, after those left before it. From any thread, until `close`."""
        self._calls.append(call)
        with suppress(BlockingIOError):  # full of wakings that are still to be read
            self._writer.send(b"\0")

    def close(self) -> None:
        """Free the sockets; what is still there will be called."""
        self._empty()
        self._loop.remove_reader(self._reader)
        self._reader.close()
        self._writer.close()

    def _empty(self) -> None:
        with suppress(BlockingIOError):
            self._reader.recv(_WAKINGS)
        while self._calls:
            self._loop.call_soon(self._calls.popleft())
