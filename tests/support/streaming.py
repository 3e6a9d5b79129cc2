"""A client of `/stream`, and the WebSockets of other people's library beneath it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import pytest
from running import Running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect


class Stream:
    """An open stream: frames in, answers out, each read when the test wants it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.socket.send(frame)

    def answer(self) -> dict[str, Any]:
        return json.loads(self.socket.recv(timeout=20))

    def ask(self, frame: bytes) -> dict[str, Any]:
        self.send(frame)
        return self.answer()

    def closed(self) -> tuple[int, str]:
        """The code and reason with which the server closes, after the last answer."""
        with pytest.raises(ConnectionClosed) as end:
            self.socket.recv(timeout=20)
        assert end.value.rcvd is not None, "the connection ended without a close frame"
        return end.value.rcvd.code, end.value.rcvd.reason


@contextmanager
def stream(
    server: Running | str,
    *,
    headers: Mapping[str, str] | None = None,
    origin: str | None = None,
    **query: object,
) -> Iterator[Stream]:
    """Opens a stream; in the query, `protocols` are subprotocols and `ssl` says whom to trust."""
    protocols, trust = query.pop("protocols", None), query.pop("ssl", None)
    url = server if isinstance(server, str) else server.url
    address = f"{url.replace('http', 'ws', 1)}/stream?{urlencode(query)}"
    with connect(
        address,
        origin=origin,
        additional_headers=headers,
        subprotocols=protocols,
        proxy=None,
        ssl=trust,
        compression="deflate",
        close_timeout=5,
    ) as socket:
        yield Stream(socket)
