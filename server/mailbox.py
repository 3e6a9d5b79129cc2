"""Messages from the slots' and the decoding threads to the event loop."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Generic, TypeVar

Message = TypeVar("Message")

_WAKE_UPS: Final = 4096  # read at once


class Mailbox(Generic[Message]):
    """Messages from other threads to the event loop.

    Args:
        loop: takes the messages; the mailbox is made and closed on its thread.
        receive: called with each message, on the loop's thread.
        sockets: let `on_this_core` have its effect.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, receive: Callable[[Message], None], *, sockets: bool = True
    ) -> None:
        self._loop = loop
        self._receive = receive
        self._messages: deque[Message] = deque()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        if sockets and sys.platform == "linux":
            self._sockets = reader, writer = socket.socketpair()
            reader.setblocking(False)
            writer.setblocking(False)
            loop.add_reader(reader, self._empty)

    def leave(self, message: Message, *, on_this_core: bool = False) -> None:
        """Have the event loop receive `message`. From any thread, until `close`.

        uvloop's own wake-up is an eventfd, after which Linux may run the event loop on a core where another
        slot computes. Linux assumes that a thread writing to a socket will sleep, and wakes the reader on
        the same core (since 6.13, with epoll).

        Args:
            message: received after those that were left before it in the same way.
            on_this_core: the calling thread has no work left on its core, and other cores are busy.
        """
        if on_this_core and self._sockets is not None:
            self._messages.append(message)
            with suppress(BlockingIOError):  # it is full of wake-ups that are still to be read
                self._sockets[1].send(b"\0")
        else:
            self._loop.call_soon_threadsafe(self._receive, message)

    def close(self) -> None:
        """Free the sockets, and the receiver; messages already left are still received."""
        if self._sockets is not None:
            self._empty()
            self._loop.remove_reader(self._sockets[0])
            for end in self._sockets:
                end.close()
        # A scheduler and its mailbox know each other: they would keep the engine until the next garbage
        # collection, or for good if they are older than the last `gc.freeze`.
        self._receive = lambda _message: None  # what is left after the end

    def _empty(self) -> None:
        assert self._sockets is not None
        with suppress(BlockingIOError):
            self._sockets[0].recv(_WAKE_UPS)
        while self._messages:
            self._loop.call_soon(self._receive, self._messages.popleft())
