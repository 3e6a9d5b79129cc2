"""What a protobuf message would become, by its fields: told before the parser builds anything of it.

The parser builds an object for each field of two bytes, and takes whatever memory and time that needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from server.problems import Problem

MOST_FIELDS: Final = 4_096  # beside the images
MOST_OTHER: Final = 1 << 20  # bytes that are neither raw contents nor elements: names, numbers in lists

Known: TypeAlias = "Mapping[int, Mapping[int, Any] | None]"
"""Fields whose size is limited otherwise: messages, by their own such fields, and bytes (None)."""


def check_size(message: memoryview, known: Known, max_images: int) -> None:
    """Make sure that `message` is quickly parsed; whether it is right, the parser says.

    Args:
        message: encoded.
        known: see `Known`; of all other fields, the contents count as `MOST_OTHER` says.
        max_images: so many fields may there be, and `MOST_FIELDS` more.

    Raises:
        Problem: `body-too-large` or `malformed-request`.
    """
    try:
        _Count(MOST_FIELDS + max_images).take(message, known)
    except IndexError:
        raise Problem("malformed-request", "the message ends inside a field") from None


class _Count:
    def __init__(self, fields: int) -> None:
        self._fields_left = fields
        self._other_left = MOST_OTHER

    def take(self, message: memoryview, known: Known) -> None:
        at = 0
        while at < len(message):
            self._fields_left -= 1
            if self._fields_left < 0:
                raise Problem("body-too-large", "the message has too many fields")
            tag, at = _varint(message, at)
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                _, at = _varint(message, at)
            elif kind == 1:
                at += 8
            elif kind == 5:
                at += 4
            elif kind == 2:
                size, at = _varint(message, at)
                end = at + size
                if end > len(message):
                    raise IndexError
                inner = known.get(number)
                if inner is not None:
                    self.take(message[at:end], inner)
                elif number not in known:
                    self._other_left -= size
                    if self._other_left < 0:
                        raise Problem(
                            "body-too-large",
                            f"the message has more than {MOST_OTHER:,} bytes beside raw contents and BYTES "
                            "elements; send numbers as raw_input_contents",
                        )
                at = end


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError
