"""Connections over a Unix socket."""

from __future__ import annotations

import asyncio

from server.connection import Connection


class LocalConnection(Connection):
    """A connection whose peer is a program on this machine, and no other: it is as one over loopback."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self.client = ("127.0.0.1", 0)
