"""Who may manage the server: holders of the API key, and people on this machine."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.requests import HTTPConnection

from server.problems import Problem

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


def require_key(connection: HTTPConnection, key: SecretStr | None) -> None:
    """Let a caller pass who is on loopback, or who sends the key as `Authorization: Bearer` or `X-API-Key`.

    Raises:
        Problem: `forbidden` when no key is set, `unauthorized` when it was not sent.
    """
    if _is_local(connection):
        return
    if key is None:
        raise Problem(
            "forbidden", "only callers on loopback may do this; set TRIMRT_API_KEY to let others in"
        )
    if not is_key(_sent_key(connection), key):
        raise Problem(
            "unauthorized",
            "send the API key as `Authorization: Bearer <key>` or as `X-API-Key: <key>`",
            headers={"WWW-Authenticate": "Bearer"},
        )


def is_key(sent: str, key: SecretStr) -> bool:
    """Whether `sent` is the key; takes the same time whatever was sent."""
    return hmac.compare_digest(sent.encode(), key.get_secret_value().encode())


def _sent_key(connection: HTTPConnection) -> str:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else connection.headers.get("x-api-key", "")


def _is_local(connection: HTTPConnection) -> bool:
    """Whether a person or program on this machine calls: no proxy's client, and no other site's web page."""
    headers = connection.headers
    if connection.client is None or not _is_loopback(connection.client.host):
        return False
    if any(name in headers for name in _PROXY_HEADERS):
        return False
    # A page from elsewhere can make the local browser call us: by its own name (DNS rebinding, seen in
    # Host) or by ours (seen in Origin).
    host = headers.get("host", "")
    origin = headers.get("origin")
    return _is_loopback(urlsplit(f"//{host}").hostname or "") and origin in (
        None,
        f"{connection.url.scheme}://{host}",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
