"""What the head of a request may be: its size, its version, its target; and what is answered if it is not."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Final

import httptools

from server.problems import Problem, internal_error

log = logging.getLogger("trimrt")

HEAD_LIMIT: Final = 32 << 10
"""Most bytes of a request's line and headers; each header counts 32 more, as in HTTP/2 (RFC 9113, 6.5.2)."""

_TARGET: Final = re.compile(rb"(?:https?://[\x21-\x7e]+?)?/[\x21-\x7e]*")
_CONTROLS: Final = re.compile(rb"[^?]*%(?:[01][0-9A-Fa-f]|7[Ff])")  # escaped in a path


def check_size(url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse a head of more than `HEAD_LIMIT`."""
    if len(url) + sum(len(name) + len(value) + 32 for name, value in headers) > HEAD_LIMIT:
        raise head_too_large()


def check_version(version: str, *, host: bool, chunked: bool) -> None:
    """Refuse a head that its version does not allow (RFC 9112, sections 2.3, 3.2 and 6.1)."""
    if version not in ("1.0", "1.1"):
        raise Problem("version-not-supported", f"HTTP/{version} is not supported; send HTTP/1.1")
    if version == "1.1" and not host:
        raise Problem("malformed-request", "the request has no Host header")
    if version == "1.0" and chunked:
        raise Problem("malformed-request", "HTTP/1.0 has no Transfer-Encoding")


def check_target(url: bytes) -> None:
    """Refuse what is no path. Starlette finds a route also with a newline behind its path."""
    if not _TARGET.fullmatch(url) or _CONTROLS.match(url):
        raise Problem("malformed-request", "the request's target is no path, or has control characters")


def without_offer(
    method: bytes, target: bytes, version: str, headers: Sequence[tuple[bytes, bytes]]
) -> bytes:
    """The head again, less the other protocol that it offers to speak."""
    line = b"%b %b HTTP/%b" % (method, target, version.encode())
    kept = [b"%b: %b" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join([line, *kept, b"", b""])


def head_too_large() -> Problem:
    """What is answered to a head, or a body's framing, of more than `HEAD_LIMIT`."""
    return Problem(
        "head-too-large",
        f"the request's line, headers and trailers, or what surrounds its chunks, take more than "
        f"{HEAD_LIMIT:,} bytes",
    )


def as_problem(error: httptools.HttpParserError) -> Problem:
    """What the client is told of what the parser raised; a mistake of the server's is logged."""
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
    if isinstance(cause, Problem):
        return cause
    if isinstance(cause, httptools.HttpParserError):
        return Problem("malformed-request", f"the request is not valid HTTP: {cause}")
    log.error("a request failed", exc_info=cause)
    return internal_error()
