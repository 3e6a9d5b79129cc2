"""A stream's connection: wsproto's WebSocket on asyncio's transport.

It takes a connection over from the HTTP protocol, with what that guards against: clients that never read,
never send, or never leave, and clients that send so much that others wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from wsproto import WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

from server.middleware import log_access
from server.service import Service
from server.stream.frames import GOING_AWAY, Frames

_PING_S: Final = 20.0  # a proxy gives up a connection on which nothing comes for 30 s or more
_CLOSING_S: Final = 5.0  # how long the client has to answer the closing handshake
_TURN_S: Final = 0.002  # see `server.protocol`
_IDLE: Final = 4408


class StreamConnection(asyncio.Protocol):
    """One client's stream, from the handshake to the end of the connection.

    Args:
        service: the application's.
        transport: on which the handshake has been answered.
        socket: the WebSocket, open.
        head: see `Frames`.
        request_id: see `Frames`.
        lost: told of the end of the connection, in the place of the protocol that had it.
    """

    def __init__(
        self,
        service: Service,
        transport: asyncio.Transport,
        socket: WSConnection,
        head: Mapping[str, Any],
        request_id: str,
        lost: Callable[[Exception | None], None],
    ) -> None:
        self._service = service
        self._transport = transport
        self._socket = socket
        self._head = head
        self._request_id = request_id
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._frames = Frames(service, head, request_id, self._answer, self._close)
        self._began = self._last_frame = time.monotonic()
        self._heard = True  # something came since the last look
        self._asked = False  # a ping was sent since then
        self._unparsed = False  # what came is parsed in a later turn of the event loop
        self._stuck = False  # the client does not read
        settings = service.settings
        self._quiet_s = settings.keep_alive_s or settings.timeout_ms / 1000
        self._look_s = min(_PING_S, self._quiet_s / 4)
        self._timer = self._loop.call_later(self._look_s, self._look)
        self._limit: asyncio.TimerHandle | None = None  # until when the client must have read, or closed

    # --- what comes ------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """The transport: something came."""
        self._heard = True
        if self._socket.state is not ConnectionState.CLOSED:
            self._socket.receive_data(data)
            self._parse()

    def _parse(self) -> None:
        """Parse what came, for as long as other connections can wait."""
        self._unparsed = False
        end = time.monotonic() + _TURN_S
        with self._service.registry.decoding_limits.precedence:
            for event in self._socket.events():
                self._take(event)
                if self._transport.is_closing():
                    return
                if time.monotonic() > end:
                    self._unparsed = True
                    self._loop.call_soon(self._parse)
                    break
        self._read_on_or_not()

    def _read_on_or_not(self) -> None:
        if self._transport.is_closing():
            return
        if self._unparsed or self._stuck:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _take(self, event: Event) -> None:
        if isinstance(event, BytesMessage):
            self._last_frame = time.monotonic()
            self._frames.receive(bytes(event.data), whole=event.message_finished)
        elif isinstance(event, TextMessage):
            self._frames.end(CloseReason.UNSUPPORTED_DATA, "frames are binary messages")
        elif isinstance(event, Ping):
            if self._socket.state is ConnectionState.OPEN:
                self._transport.write(self._socket.send(event.response()))
        elif isinstance(event, CloseConnection):
            self._frames.abandon()
            if self._socket.state is ConnectionState.REMOTE_CLOSING:
                self._transport.write(self._socket.send(event.response()))
            elif self._socket.state is ConnectionState.OPEN:  # what came is no WebSocket's
                self._transport.write(self._socket.send(event))
            self._end_within(_CLOSING_S)
            self._transport.close()

    # --- what goes -------------------------------------------------------------------------------------

    def _answer(self, text: bytes) -> None:
        self._write(TextMessage(text.decode()))

    def _write(self, event: TextMessage | CloseConnection | Ping) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._socket.send(event))

    def _close(self, code: int, reason: str) -> None:
        self._write(CloseConnection(code, reason))
        self._end_within(_CLOSING_S)

    def _end_within(self, seconds: float) -> None:
        if self._limit is not None:
            self._limit.cancel()
        self._limit = self._loop.call_later(seconds, self._transport.abort)

    def pause_writing(self) -> None:
        """The transport: the client does not read its answers. It is not read either."""
        self._stuck = True
        self._frames.hold()
        self._end_within(self._quiet_s)
        self._read_on_or_not()

    def resume_writing(self) -> None:
        """The transport: it reads again."""
        self._stuck = False
        if self._limit is not None and self._socket.state is ConnectionState.OPEN:
            self._limit.cancel()
        self._read_on_or_not()
        self._frames.go_on()

    # --- the end ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See whether the client is still there, and still sends."""
        self._timer = self._loop.call_later(self._look_s, self._look)
        if self._socket.state is not ConnectionState.OPEN or self._stuck:
            return
        if time.monotonic() - self._last_frame >= self._quiet_s:
            self._frames.end(_IDLE, f"no frame came for {self._quiet_s:g} s")
        elif self._heard:
            self._heard = self._asked = False
        elif self._asked:
            self._transport.abort()
        else:
            self._asked = True
            self._write(Ping())

    def shutdown(self) -> None:
        """uvicorn: the server stops."""
        self._frames.end(GOING_AWAY, "the server stops")

    def eof_received(self) -> None:
        """The transport: the client is gone, without a closing handshake. The transport closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport: the connection is over."""
        self._timer.cancel()
        if self._limit is not None:
            self._limit.cancel()
        self._frames.abandon()
        log_access(
            self._head,
            "GET",
            "/stream",
            101,
            self._request_id,
            self._began,
            frames=self._frames.count,
            dropped=self._frames.dropped,
        )
        self._lost(exc)
