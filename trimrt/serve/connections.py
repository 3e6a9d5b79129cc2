"""Connections, accepted by the supervisor and handed to the workers.

Left to the kernel, connections that clients keep open would lie where chance put them (`SO_REUSEPORT`), or a
burst of them with the worker that woke first (a shared listening socket). So the supervisor accepts, and
gives each connection to the worker with the fewest. A worker tells of every connection that closes by a byte
on the socket over which it gets them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

log = logging.getLogger("trimrt.workers")

CONNECTION: Final = b"\0"  # what a worker is handed: a client's connection
LINK: Final = b"\1"  # its link to the process that runs engines for all workers

_BACKLOG: Final = 2048
_AT_ONCE: Final = 64  # of connections that closed, or that are accepted before anything else is done
_PAUSE_S: Final = 0.1  # when no connection can be accepted or handed over


class Taker:
    """A worker, as someone who takes connections.

    Args:
        end: of a pair of sockets whose other end the worker's `take_connections` has.
    """

    def __init__(self, end: socket.socket) -> None:
        self.open = 0
        self.newest = 0  # number of the connection that it was given last
        self._end = end
        end.setblocking(False)
        asyncio.get_running_loop().add_reader(end, self._count_closed)

    def give(self, connection: socket.socket, number: int) -> None:
        """Hand a connection over.

        Raises:
            OSError: it takes none.
        """
        socket.send_fds(self._end, [CONNECTION], [connection.fileno()])
        self.open += 1
        self.newest = number

    def link(self, end: socket.socket) -> None:
        """Hand over an end of the link between a worker and the owner of engines.

        Raises:
            OSError: it takes nothing.
        """
        socket.send_fds(self._end, [LINK], [end.fileno()])

    def close(self) -> None:
        """Give it none any more."""
        asyncio.get_running_loop().remove_reader(self._end)
        self._end.close()

    def _count_closed(self) -> None:
        try:
            closed = len(self._end.recv(_AT_ONCE))
        except BlockingIOError:
            return
        except ConnectionError:
            closed = 0
        self.open -= closed
        if not closed:  # it takes no more
            asyncio.get_running_loop().remove_reader(self._end)


class Acceptor:
    """Accepts connections from `listeners`, and hands each to the taker with the fewest.

    Args:
        listeners: bound, not yet listening.
        takers: who takes connections now; while there are none, they wait in the kernel.
    """

    def __init__(self, listeners: Sequence[socket.socket], takers: Callable[[], Iterable[Taker]]) -> None:
        self._listeners = listeners
        self._takers = takers
        self._accepted = 0
        self._loop = asyncio.get_running_loop()
        for listener in listeners:
            listener.setblocking(False)
            listener.listen(_BACKLOG)
            self._loop.add_reader(listener, self._accept, listener)

    def close(self) -> None:
        """Accept none any more."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            takers = sorted(self._takers(), key=lambda taker: (taker.open, taker.newest))
            if not takers:
                self._pause(listener)
                return
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # such as too many open files
                log.warning("no connection can be accepted", extra={"reason": error.strerror})
                self._pause(listener)
                return
            with connection:
                self._give(connection, takers)

    def _give(self, connection: socket.socket, takers: Iterable[Taker]) -> None:
        if connection.family != socket.AF_UNIX:
            # asyncio turns off Nagle's algorithm only for connections that it accepted itself.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._accepted += 1
        for taker in takers:
            with suppress(OSError):
                taker.give(connection, self._accepted)
                return

    def _pause(self, listener: socket.socket) -> None:
        self._loop.remove_reader(listener)
        self._loop.call_later(_PAUSE_S, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener, self._accept, listener)
