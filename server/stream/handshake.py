"""The opening of a stream (RFC 6455, section 4): the offer of a WebSocket, where it comes from, the key."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Final

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Request
from wsproto.utilities import ProtocolError

from server.problems import Problem
from server.settings import Settings

PROTOCOL: Final = "trimrt"
"""The subprotocol that is accepted."""
KEY_PREFIX: Final = "trimrt.key."
"""Begins a subprotocol that is the API key, in unpadded base64url: pages cannot send headers here."""

Headers = Sequence[tuple[bytes, bytes]]


def accept(url: bytes, headers: Headers, request_id: str) -> tuple[WSConnection, bytes] | None:
    """The WebSocket that a head offers, and the answer that opens it; None if the offer is not valid."""
    socket = WSConnection(ConnectionType.SERVER)
    try:
        socket.initiate_upgrade_connection(list(headers), url)
        (offer,) = socket.events()
    except (ProtocolError, ValueError):  # the second: names that are not ASCII
        return None
    assert isinstance(offer, Request)
    # No extension is accepted: compression costs time, and images are compressed.
    accepted = AcceptConnection(
        subprotocol=PROTOCOL if PROTOCOL in offer.subprotocols else None,
        extra_headers=[(b"x-request-id", request_id.encode())],
    )
    return socket, socket.send(accepted)


def check_origin(headers: Mapping[bytes, bytes], settings: Settings) -> None:
    """Refuse pages of other sites, which browsers let open a WebSocket to any server.

    Raises:
        Problem: `forbidden`; `--cors-origin` does not name the site.
    """
    origin = headers.get(b"origin", b"").decode("latin-1")
    site = origin.partition("://")[2].lower()
    allowed = settings.cors_origins
    if not origin or site == headers.get(b"host", b"").decode("latin-1").lower():
        return
    if origin not in allowed and "*" not in allowed:
        raise Problem(
            "forbidden", f"pages of {origin[:100]} may not open a stream; --cors-origin names those that may"
        )


def with_sent_key(headers: Headers) -> Headers:
    """The head, in which a key that came as a subprotocol is the header `X-API-Key`."""
    for name, value in headers:
        if name == b"sec-websocket-protocol":
            for offered in value.decode("latin-1").split(","):
                if offered.strip().startswith(KEY_PREFIX):
                    return [*headers, (b"x-api-key", _decoded(offered.strip().removeprefix(KEY_PREFIX)))]
    return headers


def _decoded(key: str) -> bytes:
    try:
        return base64.b64decode(key + "=" * (-len(key) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""  # which is no key
