"""Request bodies: read whole into memory under a limit, and multipart forms taken apart there.

Nothing is spooled to disk, and an image's bytes are copied once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from server.problems import Problem

# A request answered sooner than this never pays for watching its connection.
_UNWATCHED_S = 0.2


class Part(NamedTuple):
    """One part of a multipart form; `filename` is None unless the client gave one."""

    name: str
    filename: str | None
    data: bytes


class BodyMemory:
    """Bounds what all request bodies together may hold in memory.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit

    def take(self, size: int) -> None:
        """Hold so many bytes more; they must be given `back`.

        Raises:
            Problem: `queue-full`; nothing was taken.
        """
        if self.held + size > self.limit:
            raise Problem(
                "queue-full",
                f"request bodies hold {self.held:,} bytes, the limit is {self.limit:,}; try again",
                headers={"Retry-After": "1"},
            )
        self.held += size

    def back(self, size: int) -> None:
        """Hold so many bytes less."""
        self.held -= size

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Gives a function like `take`, and what it took back when the block ends."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self.take(size)
            taken += size

        try:
            yield take
        finally:
            self.back(taken)


async def read_body(request: Request, limit: int, timeout: float, take: Callable[[int], None]) -> bytes:
    """The request's body.

    Args:
        request: whose body has not been touched.
        limit: most bytes accepted.
        timeout: seconds within which all of it must have arrived.
        take: told of the bytes as they come; see `BodyMemory.share`.

    Raises:
        Problem: `body-too-large`, `body-timeout` or `queue-full`.
        ClientDisconnect: the client went away.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise body_too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        with _Timeout(timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise body_too_large(limit)
                take(len(chunk))
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except asyncio.TimeoutError:
        raise Problem("body-timeout", f"the body had not arrived after {timeout:g} s") from None


def body_too_large(limit: int) -> Problem:
    """What is answered to a body of more than `limit` bytes."""
    return Problem("body-too-large", f"the body is larger than the limit of {limit:,} bytes")


def parse_multipart(content_type: str, body: bytes) -> list[Part]:
    """The parts of a `multipart/form-data` body, in order.

    Args:
        content_type: the header's value, with the boundary.
        body: all of it.

    Raises:
        Problem: `malformed-request`.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Problem("malformed-request", "the multipart Content-Type names no boundary")
    collector = _Collector()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": collector.begin,
                "on_header_field": collector.header_name,
                "on_header_value": collector.header_value,
                "on_header_end": collector.header_end,
                "on_part_data": collector.data,
                "on_part_end": collector.end,
                "on_end": collector.finish,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem("malformed-request", f"the multipart body cannot be parsed: {error}") from None
    if not collector.finished:
        raise Problem("malformed-request", "the multipart body ends before its last boundary")
    return collector.parts


class _Collector:
    """Gathers parts from the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.finished = False

    def begin(self) -> None:
        self._name, self._value = b"", b""
        self._disposition = b""
        self._chunks: list[bytes] = []

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name, self._value = b"", b""

    def data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def end(self) -> None:
        _, options = parse_options_header(self._disposition)
        filename = options.get(b"filename")
        self.parts.append(
            Part(
                options.get(b"name", b"").decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
                b"".join(self._chunks),
            )
        )

    def finish(self) -> None:
        self.finished = True


class _Timeout:
    """Interrupts the running task after so many seconds; leaving it then raises `asyncio.TimeoutError`.

    `asyncio.timeout` needs Python 3.11, and the portable ones take four times as long to set up.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._interrupt)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._over and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError

    def _interrupt(self) -> None:
        self._over = True
        self._task.cancel()


class CancelOnDisconnect:
    """Cancels the running task when the client goes away; leaving it then raises `ClientDisconnect`.

    The body must have been read.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(_UNWATCHED_S, self._start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone and kind is asyncio.CancelledError:
            raise ClientDisconnect

    def _start(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
