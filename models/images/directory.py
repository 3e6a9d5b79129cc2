"""Directories of tags, which TIFF files and EXIF data consist of (TIFF 6.0, section 2)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q"}  # for `struct`, by type
_RATIONALS: Final = (5, 10)
_TEXTS: Final = (1, 2, 6, 7)


class Tag(NamedTuple):
    """One entry of a directory.

    Attributes:
        number: what it says.
        type: TIFF's number of the values' type.
        values: how many it has.
        position: where they are, in bytes from the beginning.
        size: how many bytes they take; 0 if the type is unknown.
    """

    number: int
    type: int
    values: int
    position: int
    size: int

    @property
    def seconds(self) -> float:
        """Time that Pillow takes to read it, once."""
        each = 4e-6 if self.type in _RATIONALS else 0.0 if self.type in _TEXTS else 0.1e-6
        return 15e-6 + each * self.values


class Directories:
    """Reads directories of tags.

    Args:
        data: begins with the byte order.

    Raises:
        ValueError: it does not.
        struct.error: it is too short.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        beginning = data[:4]
        if beginning not in (b"II*\0", b"MM\0*", b"II+\0"):
            raise ValueError(f"a TIFF file does not begin with {beginning!r}")
        self._order = "<" if beginning[:1] == b"I" else ">"
        self._big = beginning[2:3] == b"+"
        self._offset_format = "<Q" if self._big else f"{self._order}I"
        (self.first,) = struct.unpack_from(self._offset_format, data, 8 if self._big else 4)

    def tags(self, offset: int, most: int) -> Iterator[Tag]:
        """The tags of the directory at `offset`, no more than `most`; it may end early if the data does."""
        data, order = self._data, self._order
        if self._big:
            count_format, entry_format, inline = "<Q", "<HHQ", 8
        else:
            count_format, entry_format, inline = f"{order}H", f"{order}HHI", 4
        width = struct.calcsize(entry_format) + inline
        if offset + 8 > len(data):
            return
        (count,) = struct.unpack_from(count_format, data, offset)
        position = offset + struct.calcsize(count_format)
        for _ in range(min(count, most)):
            if position + width > len(data):
                return
            number, kind, values = struct.unpack_from(entry_format, data, position)
            size = values * _SIZES.get(kind, 0)
            where = position + width - inline
            if size > inline:
                (where,) = struct.unpack_from(self._offset_format, data, where)
            yield Tag(number, kind, values, where, size)
            position += width

    def integers(self, tag: Tag, most: int) -> tuple[int, ...]:
        """The first values of `tag`, no more than `most`.

        Raises:
            ValueError: they are not integers, or not in the data.
        """
        if tag.type not in _INTEGERS or tag.position + tag.size > len(self._data):
            raise ValueError(f"tag {tag.number} has no integers")
        count = min(tag.values, most)
        return struct.unpack_from(f"{self._order}{count}{_INTEGERS[tag.type]}", self._data, tag.position)
