"""uvicorn's HTTP protocol, in which `POST /predict` goes straight from the parser to an `Exchange`.

The layers of ASGI in between (a task, events, messages, requests and responses as objects) took half of the
event loop's time. Everything else, and what they do better, still goes through them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.exchange import Exchange
from server.middleware import access_log, request_id_of


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._state = self.config.app.state  # type: ignore[union-attr]
        self._direct: RequestResponseCycle | None = None  # the request under way, if it goes straight
        self._exchange: Exchange | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """uvicorn: the request's head is there, and the answers to those before it are written."""
        if not self._goes_straight(cycle, app):
            super()._start_asgi_task(cycle, app)
            return
        self._direct = cycle
        self._request_id = request_id_of(cycle.scope["headers"])
        exchange = Exchange(self._state.service, cycle.scope, self._request_id, self._respond)
        if cycle.response_complete:
            return
        self._exchange = exchange
        # Of a request that waited for those before it, the body may be here.
        if cycle.body:
            exchange.receive(bytes(cycle.body))
        if not cycle.more_body:
            exchange.complete()

    def _goes_straight(self, cycle: RequestResponseCycle, app: Any) -> bool:
        scope = cycle.scope
        return (
            scope["path"] == "/predict"
            and scope["method"] == "POST"
            and app is self.app  # not uvicorn's own refusal
            and not cycle.waiting_for_100_continue
            and not self.flow.write_paused  # a client that does not read its answers is waited for
            and not access_log.isEnabledFor(logging.INFO)  # there, who is behind a proxy is found out
        )

    def on_body(self, body: bytes) -> None:
        """The parser: a part of the body of `self.cycle`, the newest request."""
        if self.cycle is self._direct and self._exchange is not None:
            self._exchange.receive(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The parser: `self.cycle` is whole."""
        if self.cycle is self._direct and self._exchange is not None:
            self.cycle.more_body = False
            self._exchange.complete()
        else:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport: the client is gone."""
        if self._exchange is not None:
            self._exchange.abandon()
            self._exchange = None
        super().connection_lost(exc)

    def _respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """See `Exchange`. Head and body in one piece: one system call, and one reading by the client."""
        cycle = self._direct
        assert cycle is not None
        self._direct = self._exchange = None
        cycle.response_started = cycle.response_complete = True
        if self._state.lifecycle.draining:
            cycle.keep_alive = False
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        if not cycle.keep_alive:
            lines.append("connection: close\r\n")
        lines.append(f"x-request-id: {self._request_id}\r\ncontent-length: {len(body)}\r\n\r\n")
        date = [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        self.transport.write(b"".join((STATUS_LINE[status], *date, "".join(lines).encode(), body)))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()
