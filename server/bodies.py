"""Request bodies: the memory they may hold, and multipart forms taken apart there.

Nothing is spooled to disk, and an image's bytes are copied once.
"""

from __future__ import annotations

from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.disposition import parse_disposition
from server.problems import Problem


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

    def release(self, size: int) -> None:
        """Give `size` reserved bytes back."""
        self.held -= size


def body_too_large(limit: int) -> Problem:
    """What is answered to a body of more than `limit` bytes."""
    return Problem("body-too-large", f"the body is larger than the limit of {limit:,} bytes")


def parse_multipart(content_type: str, body: bytes) -> list[Part]:
    """The parts of a `multipart/form-data` body, in order.

    Args:
        content_type: the header's value, with the boundary.
        body: all of it.

    Raises:
        Problem: `malformed-request`.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Problem("malformed-request", "the multipart Content-Type names no boundary")
    collector = _Collector()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": collector.begin,
                "on_header_field": collector.header_name,
                "on_header_value": collector.header_value,
                "on_header_end": collector.header_end,
                "on_part_data": collector.data,
                "on_part_end": collector.end,
                "on_end": collector.finish,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem("malformed-request", f"the multipart body cannot be parsed: {error}") from None
    if not collector.finished:
        raise Problem("malformed-request", "the multipart body ends before its last boundary")
    return collector.parts


class _Collector:
    """Gathers parts from the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.finished = False

    def begin(self) -> None:
        self._name, self._value = b"", b""
        self._disposition = b""
        self._chunks: list[bytes] = []

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name, self._value = b"", b""

    def data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def end(self) -> None:
        name, filename = parse_disposition(self._disposition)
        self.parts.append(Part(name, filename, b"".join(self._chunks)))

    def finish(self) -> None:
        self.finished = True
