"""What uvicorn's cycles get in the place of a connection's transport and of its flow control."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl


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
