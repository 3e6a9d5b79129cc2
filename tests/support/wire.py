"""A connection on which a test writes what it likes."""

from __future__ import annotations

import json
import socket
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from running import Running


class Wire:
    """One connection; what the server answers is read answer by answer."""

    def __init__(self, server: Running, receive_buffer: int | None = None) -> None:
        address = urlsplit(server.url)
        self.socket = socket.socket()
        self.socket.settimeout(20)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((address.hostname, address.port))

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and parsed body of the next answer, and nothing of the one after it."""
        response = HTTPResponse(_Bytewise(self.socket))  # type: ignore[arg-type]
        response.begin()
        body = json.loads(response.read())
        return response.status, {name.lower(): value for name, value in response.headers.items()}, body

    def closed_by_server(self) -> bool:
        """Whether nothing more comes, and the server says so."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


class _Bytewise:
    """A socket for `HTTPResponse` that reads no further than the answer goes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def makefile(self, mode: str) -> Any:
        return self._connection.makefile(mode, buffering=1)


def head(
    length: int | str, *headers: str, path: str = "/predict", version: str = "1.1", method: str = "POST"
) -> bytes:
    """A request's head, for a body of `length` bytes; without a Content-Length if that is no number."""
    lines = [f"{method} {path} HTTP/{version}", "Host: x", "Content-Type: image/png", *headers]
    if isinstance(length, int):
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()
