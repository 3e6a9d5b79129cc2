"""uvicorn's HTTP protocol, made safe against clients that send too much, too slowly, or stop half-way.

What uvicorn leaves open: heads without a limit or an end, clients that never send, read or leave, answers
that are lost because the rest of the request was not read, and offers to speak another protocol.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server import heads
from server.patience import Patience
from server.problems import Problem
from server.service import service_of
from server.transport import CycleTransport, Flow, last_answer

# Bytes parsed at once. The shortest requests that fit in a piece are parsed in a few milliseconds.
_PIECE: Final = 4 << 10
_LARGE_PIECE: Final = 64 << 10  # of a body
_SMALL: Final = heads.HEAD_LIMIT // 2  # a head of so many bytes and `_FEW` headers is within the limit
_FEW: Final = heads.HEAD_LIMIT // 2 // 32
_TURN_S: Final = 0.002  # how long what one connection received is parsed before others get their turn
_PROBE_S: Final = 1.0
_CHECKED: Final = frozenset({b"host", b"transfer-encoding", b"expect"})
_IDLE, _HEAD, _BODY = 0, 1, 2  # the newest request is whole or there is none; its head, its body is coming


class HardenedProtocol(HttpToolsProtocol):
    """One client's connection; every request goes to the ASGI application.

    Subclasses may answer a request themselves. While they do, `cycle.response_complete` is false. They may
    hand the connection over to another protocol.
    """

    cycle: Any
    flow: Flow

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.service = service_of(self.config.app)  # type: ignore[arg-type]
        self.version = ""  # of the newest request's HTTP
        self._phase = _IDLE
        self._head_size = 0  # bytes of the head, and at most a piece more
        self.progress = False  # a part of the body has come since the last look
        self._framing = 0  # bytes since then: what surrounds the body's chunks
        self.ending = False  # no request follows those that are under way
        self._closing = False  # nothing is answered any more
        self._deaf = False  # nothing is parsed any more
        self.handed_over = False  # the transport has another protocol, which tells of the connection's end
        self._eof = False  # the client sends nothing any more
        self._held = memoryview(b"")  # what came and is not parsed yet
        keep_alive, timeout = self.timeout_keep_alive, self.service.settings.timeout_ms / 1000
        self._patience = Patience(self.loop, self._cut_off, keep_alive, timeout)
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport: a client has connected."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.flow = Flow(self.transport)
        self._patience.await_first()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport: the client is gone."""
        self._patience.cancel()
        if self._unread is not None:
            self._unread.cancel()
        self._closing = True
        self.pipeline.clear()
        self._held = memoryview(b"")
        super().connection_lost(exc)

    # --- what comes ------------------------------------------------------------------------------------

    def data_received(self, data: bytes | memoryview) -> None:
        """The transport: something came."""
        size = len(data)
        self._patience.until = math.inf
        with self.service.registry.decoding_limits.precedence:
            if size <= _PIECE and not self.pipeline:
                self._parse(data)
            else:
                self._parse_in_pieces(memoryview(data))
        if self.cycle is None or self.cycle.response_complete or self._closing:
            self.await_client(size - len(self._held))

    def _parse_in_pieces(self, data: memoryview) -> None:
        """Parse `data`, but hold back what follows a request that waits for an earlier one, or its turn."""
        end = time.monotonic() + _TURN_S
        while data:
            if not self._deaf and (self.pipeline or time.monotonic() > end):
                self._held = data
                self.flow.hold()
                if not self.pipeline:
                    self.loop.call_soon(self._parse_held)
                return
            size = _LARGE_PIECE if self._phase == _BODY else _PIECE
            self._parse(data[:size])
            data = data[size:]

    def _parse_held(self) -> None:
        held, self._held = self._held, memoryview(b"")
        if held and not self.transport.is_closing():
            self.flow.release()
            self.data_received(held)

    def _parse(self, data: bytes | memoryview) -> None:
        rest = self._parse_to_offer(data)
        while rest:
            rest = self._parse_to_offer(rest)

    def _parse_to_offer(self, data: bytes | memoryview) -> memoryview | None:
        """Parse `data` to its end, or to that of a head which offers another protocol: what is left."""
        if self._deaf:
            return None
        size = len(data)
        self._head_size = self._head_size + size if self._phase == _HEAD else size
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            offer = error.args[0]
            if self._takes_up(early=offer < size):
                return None
        except httptools.HttpParserError as error:
            self._reject(heads.as_problem(error))
            return None
        else:
            if self._phase != _IDLE:
                self._check_unfinished(size)
            return None
        # llhttp takes what follows for the other protocol's. RFC 9110, 7.8: an offer may be ignored.
        version = self.parser.get_http_version()
        head = heads.without_offer(self.parser.get_method(), self.url, version, self.headers)
        # After a request that is the connection's last, the old one takes no more.
        self.parser = httptools.HttpRequestParser(self)
        with suppress(AttributeError):  # httptools before 0.6.3
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
        self._parse_to_offer(head)
        return memoryview(data)[offer:]

    def _takes_up(self, *, early: bool) -> bool:
        """Take up the offer of the head that is there, or refuse it; whether either was done."""
        if self._under_way() or self.ending:
            return False
        try:
            heads.check_size(self.url, self.headers)
            heads.check_version(self.parser.get_http_version(), host=self._host, chunked=self._chunked)
            self._deaf = self.handed_over = self.take_up(early=early)
        except Problem as problem:
            self._reject(problem)
            return True
        return self.handed_over

    def take_up(self, *, early: bool) -> bool:
        """Give the transport another protocol, if the head that is there offers one that is spoken here.

        `early`: something came before the offer was answered. Raises a `Problem` to refuse the request.
        """
        return False

    def _check_unfinished(self, size: int) -> None:
        """Refuse a head, or what surrounds a body's chunks, that takes too much already."""
        if self._phase == _HEAD:
            # What came before it in its first piece was counted too; `begins` looks closer.
            too_much = self._head_size > heads.HEAD_LIMIT + _LARGE_PIECE
        else:
            self._framing = 0 if self.progress else self._framing + size
            self.progress = False
            too_much = self._framing > heads.HEAD_LIMIT
        if too_much:
            self._reject(heads.head_too_large())

    # --- the parser's calls, in their order ------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins. What uvicorn makes for it is made once it is known where it goes."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._host = self._chunked = False  # whether the head has such a header
        self._phase = _HEAD
        self._patience.begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; or a trailer, which says nothing that counts."""
        if self._phase == _HEAD:
            name = name.lower()
            if name in _CHECKED:
                self._check_header(name, value)
            self.headers.append((name, value))

    def _check_header(self, name: bytes, value: bytes) -> None:
        """Note what a header says of the request's framing; refuse what leaves room for two opinions."""
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"host":
            if self._host:
                raise Problem("malformed-request", "the request has two Host headers")
            self._host = True
        elif value.strip().lower() != b"chunked":
            raise Problem("coding-not-supported", "the only Transfer-Encoding that is accepted is chunked")
        else:
            self._chunked = True  # the parser refuses it twice, and beside a Content-Length

    def on_headers_complete(self) -> None:
        """The head is there."""
        if self.begins():
            self.hand_to_application()

    def begins(self) -> bool:
        """Whether the head that is there begins a request to answer."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise Problem("method-not-allowed", "this server is no proxy")
            return False  # it is parsed again, without the offer
        if self._head_size > _SMALL or len(self.headers) > _FEW:
            heads.check_size(self.url, self.headers)
        self.version = self.parser.get_http_version()
        if self.version != "1.1" or not self._host:
            heads.check_version(self.version, host=self._host, chunked=self._chunked)
        self._phase = _BODY
        self._patience.begin()
        self.progress = True
        return not self._closing

    def hand_to_application(self) -> None:
        """Let uvicorn make of the head what the application needs."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        self._phase = _HEAD
        heads.check_target(url)
        self._phase = _BODY
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers  # the list that the scope has
        super().on_headers_complete()
        self.cycle.transport = CycleTransport(self.transport, self.end)

    def on_body(self, body: bytes) -> None:
        """A part of the body of the newest request."""
        self.progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The newest request is whole."""
        if self.completes():
            super().on_message_complete()

    def completes(self) -> bool:
        """Whether the request that is whole is one to answer."""
        if self._phase == _HEAD:
            return False  # see `begins`
        self._phase = _IDLE
        self._deaf = self._closing  # what follows it is not read as requests, but read
        return not self._closing

    # --- the end of a request --------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """A cycle of uvicorn's: the request is answered."""
        self.server_state.total_requests += 1
        if self._closing:
            return
        started = bool(self.pipeline)
        if started:
            self._start_asgi_task(*self.pipeline.pop())
        if self._held and not self.pipeline:
            self.loop.call_soon(self._parse_held)
        elif not started:
            self.flow.resume_reading()
            if self.ending:
                self.end()
            else:
                self.await_client()

    def end(self) -> None:
        """Close the connection once the client has the last answer.

        To close with something unread resets the connection, and the client loses the answer: what it still
        sends is read for a while.
        """
        if self._closing or self.transport.is_closing():
            return
        self._closing = True
        self.pipeline.clear()
        if self._eof or (self._phase == _IDLE and self.service.lifecycle.draining):
            self.transport.close()
            return
        self._deaf = self._deaf or self._phase == _IDLE
        self._held = memoryview(b"")
        self.flow.release()
        self.transport.write_eof()
        self._patience.begin()
        self.await_client()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The transport: the client sends nothing more. It may have left, or wait for its answers."""
        if self._phase == _BODY and self.pipeline:
            self.pipeline.popleft()  # it never becomes whole
        elif self._phase == _BODY or self._closing or not self._under_way():
            return False
        if not self._eof:
            self._eof = self.ending = True
            self.loop.call_later(_PROBE_S, self._probe)
        return True

    def _probe(self) -> None:
        """Tell a client that left from one that waits: the system of the first resets the connection."""
        if self.transport.is_closing() or not self._under_way():
            return
        if not self.pipeline and not getattr(self.cycle, "response_started", False):
            self.say_something()
        self.loop.call_later(_PROBE_S, self._probe)

    def say_something(self) -> None:
        """Send what may come before any answer: an interim one (RFC 9110, 15.2), unknown to HTTP/1.0."""
        if self.version != "1.0":
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")

    def _under_way(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def _reject(self, problem: Problem) -> None:
        """What came cannot be parsed, and so nothing that follows it."""
        self._deaf = self.ending = True
        under_way = self._under_way()
        if self._phase == _BODY:
            if not under_way:  # it is answered already
                self.end()
                return
            if self.pipeline:
                self.pipeline.popleft()
            elif getattr(self.cycle, "response_started", False):
                self.transport.abort()
                return
            else:
                self.abandon()
                under_way = False
        if under_way:
            self.flow.pause_reading()  # those before it are answered, then the connection ends
            return
        self.transport.write(last_answer(problem, self.server_state.default_headers))
        self.end()

    def abandon(self) -> None:
        """Drop the newest request, of which a part has come."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    # --- waiting for the client ------------------------------------------------------------------------

    def await_client(self, size: int = 0) -> None:
        """Nothing is under way. From now on, a client that is silent or slow is cut off.

        Args:
            size: bytes that have just come.
        """
        if self.handed_over:
            return
        if self._phase == _IDLE and not self._closing:
            self._patience.await_request()
        elif self._phase == _HEAD and not self._closing:
            self._patience.await_head()
        else:
            self._patience.await_rest(size)

    def _cut_off(self) -> None:
        if self._closing or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._closing = True
            self.transport.close()

    def pause_writing(self) -> None:
        """The transport: the client does not read its answers."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._patience.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The transport: it reads again."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def shutdown(self) -> None:
        """uvicorn: the server stops."""
        if self._closing:
            self.transport.close()
        else:
            super().shutdown()
