"""The HTTP protocol in which an inference goes straight from the parser to the `Admission`.

The layers of ASGI in between (a task, events, messages, requests and responses as objects) took half of the
event loop's time, and what uvicorn makes for each request a fifth of the rest. Everything else, and what
they do better, still goes through them.
"""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from server.admission import Admission
from server.exchange import HttpAnswer, HttpCall, PredictCall
from server.middleware import REQUEST_TIMEOUT, access_log, request_id_of
from server.problems import Problem
from server.protocol import HardenedProtocol
from server.stream.connection import StreamConnection
from server.stream.handshake import accept, check_origin, with_sent_key
from server.v2.rest import infer_call

_BEGINNING: Final = b"HTTP/1.1 "


class Connection(HardenedProtocol):
    """One client's connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cors = bool(self.service.settings.cors_origin)
        # What uvicorn asks of its `cycle`, the newest request, while that is one that went straight.
        self._straight = SimpleNamespace(
            message_event=asyncio.Event(), keep_alive=True, response_complete=True, disconnected=False
        )
        self._admission: Admission[HttpAnswer] | None = None  # the request under way, if it goes straight
        self._date: list[tuple[bytes, bytes]] = []
        self._date_lines = b""
        self._stream: StreamConnection | None = None  # that has the transport
        self._said = 0  # bytes of the answer that were sent before it was there

    # --- the parser's calls, in their order ------------------------------------------------------------

    def on_headers_complete(self) -> None:
        """The head is there."""
        if not self.begins():
            return
        call = self._straight_call() if self._may_go_straight() else None
        if call is None:
            self.hand_to_application()
        else:
            self._begin(call)

    def _may_go_straight(self) -> bool:
        return (
            self.parser.get_method() == b"POST"
            and (self.cycle is None or self.cycle.response_complete)
            and not self.expect_100_continue
            and not self.flow.write_paused  # a client that does not read its answers is waited for
            and not access_log.isEnabledFor(logging.INFO)  # the long way resolves proxy headers for it
            and self.limit_concurrency is None
            and not (self._cors and any(name == b"origin" for name, _ in self.headers))
        )

    def _straight_call(self) -> HttpCall | None:
        """The inference that the request asks for, if it does."""
        path, _, query = self.url.partition(b"?")
        if b"#" in query:
            return None
        scope = {"headers": self.headers, "query_string": query, "client": self.client, "scheme": self.scheme}
        self._request_id = request_id_of(self.headers)
        return (
            PredictCall(scope, self._request_id)
            if path == b"/predict"
            else infer_call(path, scope, self.service.regions)
        )

    def _begin(self, call: HttpCall) -> None:
        straight = self.cycle = self._straight
        straight.response_complete = False
        straight.keep_alive = self.version != "1.0" and self.parser.should_keep_alive()
        self._admission = Admission(self.service, call, self._respond)
        self._admission.open()

    def on_body(self, body: bytes) -> None:
        """A part of the body of the newest request."""
        if self._admission is not None and self.cycle is self._straight:
            self.progress = True
            self._admission.receive(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The newest request is whole."""
        if self._admission is not None and self.cycle is self._straight:
            if self.completes():
                self._admission.complete()
        else:
            super().on_message_complete()

    def take_up(self, *, early: bool) -> bool:
        """See `HardenedProtocol`: the WebSocket of `/stream`."""
        path, _, query = self.url.partition(b"?")
        if path != b"/stream" or self.parser.get_method() != b"GET":
            return False
        if early:
            raise Problem("malformed-request", "frames may follow once the WebSocket is open")
        check_origin(dict(self.headers), self.service.settings)
        request_id = request_id_of(self.headers)
        accepted = accept(self.url, self.headers, request_id)
        if accepted is None:
            return False
        socket, answer = accepted
        self.transport.write(answer)
        scope = {
            "headers": with_sent_key(self.headers),
            "query_string": query,
            "client": self.client,
            "scheme": self.scheme,
        }
        self._stream = StreamConnection(
            self.service, self.transport, socket, scope, request_id, self.connection_lost
        )
        self.transport.set_protocol(self._stream)
        return True

    def shutdown(self) -> None:
        """uvicorn: the server stops."""
        if self._stream is None:
            super().shutdown()
        else:
            self._stream.shutdown()

    # --- the end of a request --------------------------------------------------------------------------

    def _respond(self, answer: HttpAnswer) -> None:
        """Write the answer. Head and body in one piece: one system call, and one reading by the client."""
        status, headers, body = answer
        straight = self._straight
        self._admission = None
        straight.response_complete = True
        if self._date is not self.server_state.default_headers:  # a new list every second
            self._date = self.server_state.default_headers
            self._date_lines = b"".join([b"%b: %b\r\n" % header for header in self._date])
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        keep_alive = (
            straight.keep_alive
            and status != REQUEST_TIMEOUT
            and not self.service.lifecycle.draining
            and not (self.ending and not self.pipeline)
        )
        connection = "" if keep_alive else "connection: close\r\n"
        end = f"{lines}{connection}x-request-id: {self._request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        answered = b"".join((STATUS_LINE[status], self._date_lines, end.encode(), body))
        self.transport.write(answered[self._said :] if self._said else answered)
        if not keep_alive:
            self.end()
        if self.pipeline or self.flow.read_paused:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.await_client()

    def say_something(self) -> None:
        """See `HardenedProtocol`. To HTTP/1.0, a byte of what every answer begins with."""
        super().say_something()
        if self.version == "1.0" and self._admission is not None and self._said < len(_BEGINNING):
            self._said += 1
            self.transport.write(_BEGINNING[self._said - 1 : self._said])

    def abandon(self) -> None:
        """See `HardenedProtocol`."""
        if self._admission is None:
            super().abandon()
        else:
            self._admission.abandon()
            self._admission = None
            self._straight.response_complete = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport: the client is gone."""
        if self._admission is not None:
            self._admission.abandon()
            self._admission = None
        super().connection_lost(exc)
