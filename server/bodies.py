"""Request bodies: the memory they may hold, and multipart forms taken apart there.

Nothing is spooled to disk, and an image's bytes are copied once.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from server.problems import Problem

MOST_FIELDS: Final = 64  # of a form, beside its images
_MOST_HEAD: Final = 8 << 10  # bytes of one part's headers
_PARAMETER: Final = re.compile(rb';[ \t]*([\w*-]+)=("(?:[^"\\]|\\.)*"|[^; \t]*)')
_FOLD: Final = re.compile(rb"\r\n[ \t]+")  # in a long header (RFC 5322, section 2.2.3)
_STEP: Final = 4 << 20  # bytes searched before other threads get the interpreter's lock


class Part(NamedTuple):
    """One part of a multipart form; `filename` is None unless the client gave one."""

    name: str
    filename: str | None
    data: bytes


class BodyMemory:
    """Bounds what all request bodies together may hold in memory.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit

    def reserve(self, size: int) -> None:
        """Reserve `size` bytes; `release` gives them back.

        Raises:
            Problem: `queue-full`; nothing was reserved.
        """
        if self.held + size > self.limit:
            raise Problem(
                "queue-full",
                f"request bodies hold {self.held:,} bytes, the limit is {self.limit:,}; try again",
                headers={"Retry-After": "1"},
            )
        self.held += size

    def reserve_up_to(self, size: int) -> int:
        """Reserve `size` bytes, or what is left of the limit if that is less; how many, `release` is told.

        Raises:
            Problem: `queue-full`; nothing is left.
        """
        size = max(1, min(size, self.limit - self.held))
        self.reserve(size)
        return size

    def release(self, size: int) -> None:
        """Give `size` reserved bytes back."""
        self.held -= size


def body_too_large(limit: int) -> Problem:
    """What is answered to a body of more than `limit` bytes."""
    return Problem("body-too-large", f"the body is larger than the limit of {limit:,} bytes")


def too_many_images(limit: int) -> Problem:
    """What is answered to a request with more than `limit` images."""
    return Problem("too-many-images", f"too many images; the limit is {limit} in one request")


def parse_multipart(content_type: str, body: bytes, max_images: int) -> list[Part]:
    """The parts of a `multipart/form-data` body, in order.

    Args:
        content_type: the header's value, with the boundary.
        body: all of it.
        max_images: a form may have so many parts, and `MOST_FIELDS` more.

    Raises:
        Problem: `malformed-request` or `too-many-images`.
    """
    boundary = _parameters(content_type.encode("latin-1", "replace")).get(b"boundary")
    if not boundary:
        raise Problem(
            "malformed-request",
            "the multipart Content-Type names no boundary; let your HTTP client write that header",
        )
    delimiter = b"\r\n--" + boundary
    # What comes before the first delimiter is no part; that delimiter may begin the body.
    at = -2 if body.startswith(delimiter[2:]) else _find(body, delimiter, 0)
    if at == -1:
        raise Problem(
            "malformed-request",
            f"the body has no line {delimiter[2:80].decode('latin-1')!r}, the boundary of its Content-Type",
        )
    parts: list[Part] = []
    while at != -1:
        at += len(delimiter)
        if body.startswith(b"--", at):
            return parts
        if len(parts) == max_images + MOST_FIELDS:
            raise Problem(
                "too-many-images",
                f"too many parts; the limit is {max_images} images and {MOST_FIELDS} other fields a form",
            )
        head_end = body.find(b"\r\n\r\n", at, at + _MOST_HEAD)
        if head_end < 0 and len(body) - at > _MOST_HEAD:
            raise Problem("malformed-request", f"the headers of a form's part exceed {_MOST_HEAD:,} bytes")
        if head_end < 0:
            break
        name, filename = _disposition(body[at:head_end])
        at = _find(body, delimiter, head_end + 4)
        if at >= 0:
            parts.append(Part(name, filename, body[head_end + 4 : at]))
    raise Problem("malformed-request", "the multipart body ends before its last boundary")


def _find(body: bytes, wanted: bytes, start: int) -> int:
    """As `body.find`, which would keep the interpreter's lock for tens of milliseconds of a large body."""
    if len(body) <= _STEP:
        return body.find(wanted, start)
    for begin in range(start, len(body), _STEP):
        found = body.find(wanted, begin, begin + _STEP + len(wanted) - 1)
        if found >= 0:
            return found
    return -1


@lru_cache(maxsize=64)  # most clients send the same one with every image
def _disposition(head: bytes) -> tuple[str, str | None]:
    """Name and filename by a part's head, which begins with the rest of the delimiter's line.

    Raises:
        Problem: `malformed-request`.
    """
    rest, *lines = _FOLD.sub(b" ", head).split(b"\r\n")
    if rest.strip(b" \t"):
        raise Problem("malformed-request", "a boundary of the multipart body does not end its line")
    disposition = b""
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name.strip():
            raise Problem("malformed-request", f"a part of the form has the header line {line[:80]!r}")
        if name.strip().lower() == b"content-disposition":
            disposition = value
    parameters = _parameters(disposition)
    filename = parameters.get(b"filename")
    extended = parameters.get(b"filename*", b"").split(b"'", 2)  # RFC 8187: charset, language, text
    if len(extended) == 3:
        filename = unquote_to_bytes(extended[2])
        if extended[0].lower() == b"iso-8859-1":
            filename = filename.decode("latin-1").encode()
    return (
        parameters.get(b"name", b"").decode("utf-8", "replace"),
        None if filename is None else filename.decode("utf-8", "replace"),
    )


def _parameters(header: bytes) -> dict[bytes, bytes]:
    """The parameters of a header's value. Takes time in proportion to its length, whatever it is."""
    found = {}
    for name, value in _PARAMETER.findall(header):
        if value[:1] == b'"' == value[-1:]:
            value = value[1:-1]
            if b"\\" in value:
                value = value.replace(b"\\\\", b"\\").replace(b'\\"', b'"')
        found[name.lower()] = value
    return found
