"""Who may manage the server, and use it where that is protected: holders of the API key, and this machine."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers

from server.problems import Problem

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


class Caller(NamedTuple):
    """Who calls.

    Attributes:
        address: the peer's IP address; None if it has none.
        headers: the request's headers or metadata, names in lower case.
        site: the server as the caller names it, like `http://localhost:8000`; None over gRPC, which web pages
            cannot speak.
    """

    address: str | None
    headers: Mapping[str, str]
    site: str | None

    @classmethod
    def over_http(cls, scope: Mapping[str, Any]) -> Caller:
        """The caller of an HTTP request; `scope` is the request's, as in ASGI."""
        headers = Headers(raw=scope["headers"])
        client = scope["client"]
        return cls(client and client[0], headers, f"{scope['scheme']}://{headers.get('host', '')}")


def require_key(caller: Caller, key: SecretStr | None) -> None:
    """Let a caller pass who is on loopback, or who sends the key as `Authorization: Bearer` or `X-API-Key`.

    Raises:
        Problem: `forbidden` when no key is set, `unauthorized` when it was not sent.
    """
    if _is_local(caller):
        return
    if key is None:
        raise Problem(
            "forbidden", "only callers on loopback may do this; set TRIMRT_API_KEY to let others in"
        )
    if not _is_key(_sent_key(caller.headers), key):
        raise Problem(
            "unauthorized",
            "send the API key as `Authorization: Bearer <key>` or as `X-API-Key: <key>`",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_key(sent: str, key: SecretStr) -> bool:
    """Whether `sent` is the key; takes the same time whatever was sent."""
    return hmac.compare_digest(sent.encode(), key.get_secret_value().encode())


def _sent_key(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _is_local(caller: Caller) -> bool:
    """Whether a person or program on this machine calls: no proxy's client, and no other site's web page."""
    headers = caller.headers
    if caller.address is None or not _is_loopback(caller.address):
        return False
    if any(name in headers for name in _PROXY_HEADERS):
        return False
    # A page from elsewhere can make the local browser call us: by its own name (DNS rebinding, seen in
    # Host) or by ours (seen in Origin).
    if headers.get("origin") not in (None, caller.site):
        return False
    return caller.site is None or _is_loopback(urlsplit(caller.site).hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
