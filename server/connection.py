"""uvicorn's HTTP protocol, in which `POST /predict` goes straight from the parser to an `Exchange`.

The layers of ASGI in between (a task, events, messages, requests and responses as objects) took half of the
event loop's time, and what uvicorn makes for each request a fifth of the rest. Everything else, and what
they do better, still goes through them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.exchange import Exchange
from server.middleware import access_log, request_id_of


class _Straight:
    """What uvicorn asks of its `cycle`, the newest request, while that is one that went straight."""

    __slots__ = ("disconnected", "keep_alive", "message_event", "response_complete")

    def __init__(self) -> None:
        self.message_event = asyncio.Event()  # nobody waits for it
        self.keep_alive = True
        self.response_complete = True
        self.disconnected = False


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._state = self.config.app.state  # type: ignore[union-attr]
        self._straight: Any = _Straight()
        self._exchange: Exchange | None = None  # the request under way, if it goes straight
        self._idle_since = math.inf  # with no request under way
        self._idle_timer: asyncio.TimerHandle | None = None
        self._date: list[tuple[bytes, bytes]] = []
        self._date_lines = b""

    # --- the parser's calls, in their order ------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins. What uvicorn makes for it is made once it is known where it goes."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """The head is there."""
        path, _, query = self.url.partition(b"?")
        if self._goes_straight(path, query):
            self._begin(query)
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers  # the list that the scope has
        super().on_headers_complete()

    def _goes_straight(self, path: bytes, query: bytes) -> bool:
        return (
            path == b"/predict"
            and self.parser.get_method() == b"POST"
            and not self._state.service.settings.protect_predict
            and (self.cycle is None or self.cycle.response_complete)
            and not self.expect_100_continue
            and not self.parser.should_upgrade()
            and not self.flow.write_paused  # a client that does not read its answers is waited for
            and not access_log.isEnabledFor(logging.INFO)  # there, who is behind a proxy is found out
            and b"#" not in query
            and not self.root_path
            and self.limit_concurrency is None
        )

    def _begin(self, query: bytes) -> None:
        straight = self.cycle = self._straight
        straight.response_complete = False
        straight.keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self._request_id = request_id_of(self.headers)
        scope = {"headers": self.headers, "query_string": query}
        exchange = Exchange(self._state.service, scope, self._request_id, self._respond)
        if not straight.response_complete:
            self._exchange = exchange

    def on_body(self, body: bytes) -> None:
        """A part of the body of the newest request."""
        if self._exchange is not None and self.cycle is self._straight:
            self._exchange.receive(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The newest request is whole."""
        if self._exchange is not None and self.cycle is self._straight:
            self._exchange.complete()
        else:
            super().on_message_complete()

    # --- the end of a request --------------------------------------------------------------------------

    def _respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """See `Exchange`. Head and body in one piece: one system call, and one reading by the client."""
        straight = self._straight
        self._exchange = None
        straight.response_complete = True
        if self._date is not self.server_state.default_headers:  # a new list every second
            self._date = self.server_state.default_headers
            self._date_lines = b"".join([b"%b: %b\r\n" % header for header in self._date])
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        keep_alive = straight.keep_alive and not self._state.lifecycle.draining
        connection = "" if keep_alive else "connection: close\r\n"
        end = f"{lines}{connection}x-request-id: {self._request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(b"".join((STATUS_LINE[status], self._date_lines, end.encode(), body)))
        if not keep_alive:
            self.transport.close()
        if self.pipeline or self.flow.read_paused:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self._watch_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport: the client is gone."""
        if self._exchange is not None:
            self._exchange.abandon()
            self._exchange = None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        super().connection_lost(exc)

    # --- without a request -----------------------------------------------------------------------------

    def _watch_idle(self) -> None:
        """From now on, a client that sends nothing for long is cut off: one timer for many requests."""
        if not self.transport.is_closing():
            self._idle_since = self.loop.time()
            if self._idle_timer is None:
                self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._check_idle)

    def _check_idle(self) -> None:
        self._idle_timer = None
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self.timeout_keep_alive_handler()
        elif left < math.inf:
            self._idle_timer = self.loop.call_later(left, self._check_idle)

    def _unset_keepalive_if_required(self) -> None:
        """uvicorn: something came from the client."""
        self._idle_since = math.inf
        if self.timeout_keep_alive_task is not None:
            super()._unset_keepalive_if_required()
