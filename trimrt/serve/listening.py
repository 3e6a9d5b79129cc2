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
    return _bound(settings.host, settings.port, socket.SO_REUSEADDR, "port")


def reserve_grpc(settings: Settings) -> socket.socket:
    """A socket that keeps the port for gRPC, on which several processes of this user can then listen.

    Raises:
        CannotListenError: it is taken, or not this machine's.
    """
    assert settings.grpc_port is not None
    return _bound(settings.host, settings.grpc_port, socket.SO_REUSEPORT, "grpc-port")


def _bound(host: str, port: int, reuse: int, setting: str) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        # asyncio turns off Nagle's algorithm, which would hold an answer's body back for 40 ms, only where
        # the protocol is named.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, reuse, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise CannotListenError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --{setting}"
        ) from None
