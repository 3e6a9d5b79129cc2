"""What uvicorn's cycles get for a connection's transport and flow control; a connection's last answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from server.problems import Problem


class CycleTransport:
    """The transport, but what a cycle closes is closed by `close`, and what it writes too late is dropped."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing
        self.close = close

    def write(self, data: bytes) -> None:
        """See `asyncio.Transport`; uvloop raises an error where nobody is there any more."""
        if not self._transport.is_closing():
            self._transport.write(data)


class Flow(FlowControl):
    """The flow control, but nothing is read while something read is held back."""

    _holds = False

    def hold(self) -> None:
        """Pause reading, whatever a request does that wants its body, until `release`."""
        self._holds = True
        self.pause_reading()

    def release(self) -> None:
        """Read on."""
        self._holds = False
        self.resume_reading()

    def resume_reading(self) -> None:
        """See `FlowControl`."""
        if not self._holds:
            super().resume_reading()


def last_answer(problem: Problem, default_headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The answer that tells of `problem` and of the connection's end."""
    response = problem.response()
    headers = [*default_headers, *response.raw_headers, (b"connection", b"close")]
    lines = [b"%b: %b\r\n" % header for header in headers]
    return b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", bytes(response.body)])
