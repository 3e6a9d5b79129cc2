"""Calls between the supervisor and a worker, in both directions, over a pair of sockets."""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from typing import Any, Final, NamedTuple

log = logging.getLogger("trimrt.workers")

_LENGTH: Final = 4  # bytes that say how long the message is which follows


class _Call(NamedTuple):
    number: int
    method: str
    arguments: tuple[Any, ...]


class _Answer(NamedTuple):
    number: int
    value: Any
    error: Exception | None


class Channel:
    """One end. Both processes are TrimRT's own, and nobody else can reach the sockets: messages are pickled.

    Args:
        reader: of this end's socket.
        writer: of this end's socket.
        methods: what the other end may call, by name. Calls run at the same time.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        methods: Mapping[str, Callable[..., Awaitable[Any]]],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._methods = methods
        self._numbers = count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._open = True

    @classmethod
    async def over(cls, end: socket.socket, methods: Mapping[str, Callable[..., Awaitable[Any]]]) -> Channel:
        """A channel over one of a pair of sockets, which it then owns. It is dead until `run`."""
        return cls(*await asyncio.open_unix_connection(sock=end), methods)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the other end; what it returned.

        Raises:
            ConnectionError: the other end is gone.
            Exception: what the method raised.
        """
        if not self._open:
            raise ConnectionResetError("the other process has ended")
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        self._send(_Call(number, method, arguments))
        return await future

    async def run(self) -> None:
        """Take calls and answers until the other end is gone."""
        try:
            while True:
                length = int.from_bytes(await self._reader.readexactly(_LENGTH), "big")
                self._take(pickle.loads(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open = False
            self._writer.close()
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(ConnectionResetError("the other process has ended"))

    def _take(self, message: _Call | _Answer) -> None:
        if isinstance(message, _Call):
            task = asyncio.create_task(self._answer(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        future = self._calls.pop(message.number)
        if future.done():  # whoever called has been cancelled
            return
        if message.error is not None:
            future.set_exception(message.error)
        else:
            future.set_result(message.value)

    async def _answer(self, call: _Call) -> None:
        try:
            answer = _Answer(call.number, await self._methods[call.method](*call.arguments), None)
        except Exception as error:
            answer = _Answer(call.number, None, error)
        self._send(answer)

    def _send(self, message: _Call | _Answer) -> None:
        data = pickle.dumps(message)
        self._writer.write(len(data).to_bytes(_LENGTH, "big") + data)
