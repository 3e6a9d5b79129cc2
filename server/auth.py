"""Who may manage the server, and use it where that is protected.

With a key, everyone who sends it; for inference there may be further keys. Without one, programs on this
machine, if nobody else can reach the server.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pydantic import SecretStr
from starlette.datastructures import Headers

from server.problems import Problem
from server.settings import Settings

# What proxies add to say for whom they ask; not every proxy does.
_PROXY_HEADERS: Final = frozenset(
    {"forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"}
)
_SAME_SITE: Final = (None, "none", "same-origin")
_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9.-]+))(?::\d{1,5})?", re.ASCII | re.IGNORECASE)


class Caller(NamedTuple):
    """Who calls.

    Attributes:
        address: the peer's IP address; None if it has none.
        headers: the request's headers or metadata, names in lower case, a byte a character.
        scheme: `http` or `https`; None over gRPC, which web pages cannot speak.
    """

    address: str | None
    headers: Mapping[str, str]
    scheme: str | None

    @classmethod
    def over_http(cls, scope: Mapping[str, Any]) -> Caller:
        """The caller of an HTTP request; `scope` is the request's, as in ASGI."""
        client = scope["client"]
        return cls(client and client[0], Headers(raw=scope["headers"]), scope["scheme"])


def require_key(caller: Caller, settings: Settings) -> None:
    """Let a caller pass who sends the key as `Authorization: Bearer` or `X-API-Key`.

    Programs on this machine pass without it where `settings.trust_loopback` says so, and where there is no
    key and the server listens on loopback alone.

    Raises:
        Problem: `forbidden` when no key is set, `unauthorized` when it was not sent.
    """
    key = settings.api_key
    trusts_local = settings.trust_loopback if key is not None else is_loopback(settings.host)
    if trusts_local and is_local(caller):
        return
    if key is None:
        raise Problem(
            "forbidden",
            "without a key only programs on this machine may do this, and only while the server listens on "
            "loopback alone; set TRIMRT_API_KEY and send the key",
        )
    if not _is_key(_sent_key(caller.headers), key):
        raise Problem(
            "unauthorized",
            "send the API key as `Authorization: Bearer <key>` or as `X-API-Key: <key>`",
            headers={"WWW-Authenticate": "Bearer"},
        )


def require_inference_key(caller: Caller, settings: Settings) -> None:
    """Let a caller pass who sends one of the keys for inference, or who may manage.

    Raises:
        Problem: `forbidden` or `unauthorized`, see `require_key`.
    """
    if sent_client_key(caller, settings) is None:
        require_key(caller, settings)


def sent_client_key(caller: Caller, settings: Settings) -> bytes | None:
    """SHA-256 of the key that the caller sent, if it is one of those for inference or that for managing."""
    sent = _sent_key(caller.headers)
    digest = hashlib.sha256(sent.encode("latin-1", "backslashreplace")).digest()
    if digest in settings.inference_keys or (
        settings.api_key is not None and _is_key(sent, settings.api_key)
    ):
        return digest
    return None


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an IP address, is this machine and reached from nowhere else."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _is_key(sent: str, key: SecretStr) -> bool:
    """Whether `sent` is the key; takes the same time whatever was sent.

    HTTP names no encoding for headers: clients send a key beyond ASCII in UTF-8 or in Latin-1.
    """
    secret = key.get_secret_value()
    received = sent.encode("latin-1", "backslashreplace")
    as_utf8 = hmac.compare_digest(received, secret.encode("utf-8", "surrogateescape"))
    as_latin1 = hmac.compare_digest(received, secret.encode("latin-1", "backslashreplace"))
    return as_utf8 | as_latin1


def _sent_key(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip(" \t")
    # gRPC carries bytes beyond ASCII only in metadata whose name ends with -bin.
    return headers.get("x-api-key", headers.get("x-api-key-bin", "")).strip(" \t")


def is_local(caller: Caller) -> bool:
    """Whether a program on this machine calls for itself: no proxy's client, no other site's web page."""
    headers = caller.headers
    if caller.address is None or not is_loopback(caller.address):
        return False
    if any(name in _PROXY_HEADERS or name.startswith("x-forwarded") for name in headers):
        return False
    # A page from elsewhere can make the local browser call us: by its own name (DNS rebinding, seen in
    # Host) or by ours (seen in Origin and Sec-Fetch-Site).
    host = headers.get("host", "")
    site = caller.scheme and f"{caller.scheme}://{host}"
    if headers.get("origin") not in (None, site) or headers.get("sec-fetch-site") not in _SAME_SITE:
        return False
    named = _HOST.fullmatch(host)
    return site is None or (named is not None and is_loopback(named[1] or named[2]))
