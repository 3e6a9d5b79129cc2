"""The socket that the server listens on."""

from __future__ import annotations

import socket

from models.errors import TrimRTError
from server.settings import Settings


class CannotListenError(TrimRTError):
    """The address and port cannot be had."""


def listen(settings: Settings) -> socket.socket:
    """A socket on the address that `settings` names, not yet listening.

    Raises:
        CannotListenError: it is taken, or not this machine's.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        # asyncio turns off Nagle's algorithm, which would hold an answer's body back for 40 ms, only where
        # the protocol is named.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise CannotListenError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
            "choose another with --port"
        ) from None
