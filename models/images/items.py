"""The items of an ISO media file, which HEIC and AVIF images consist of (ISO/IEC 14496-12, 23008-12).

Decoders settle contradictions in ways of their own. A file with any is refused, so that what is read here is
what they will do.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from models.images.errors import DamagedImageError, UnsupportedImageError

_MAX_BOXES: Final = 10_000
_MAX_ITEMS: Final = 1000  # libheif reads no more
_MAX_TABLE: Final = 1 << 16  # bytes that tell of so many items
_MAX_TARGETS: Final = 2000  # of all references; pillow-heif takes time in proportion to their square
_IN_FILE, _IN_META = 0, 1  # where an item's bytes are


class Box(NamedTuple):
    """A box: `data[start:end]` is its content."""

    kind: bytes
    start: int
    end: int


class Reference(NamedTuple):
    """Item `source` refers to `targets`, in the way of `kind`."""

    kind: bytes
    source: int
    targets: tuple[int, ...]


@dataclass
class Items:
    """What a file's `meta` box says.

    Attributes:
        primary: number of the item that is shown.
        kinds: of the items, by number.
        places: begin and end of each item's bytes.
        properties: of each item.
        references: between items.
        groups: bytes that tell of groups of items.
    """

    primary: int = 0
    kinds: dict[int, bytes] = field(default_factory=dict)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    properties: dict[int, list[Box]] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    groups: int = 0

    def place(self, item: int) -> tuple[int, int]:
        """Begin and end of an item's bytes.

        Raises:
            DamagedImageError: it has none.
        """
        if item not in self.places:
            raise DamagedImageError(f"damaged image: item {item} is not there")
        return self.places[item]

    def property(self, item: int, kind: bytes) -> Box:
        """The only property of a kind that an item has.

        Raises:
            DamagedImageError: it has none, or several.
        """
        found = [box for box in self.properties.get(item, []) if box.kind == kind]
        if len(found) != 1:
            raise DamagedImageError(f"damaged image: an item has {len(found)} properties {kind.decode()!r}")
        return found[0]


def read_items(data: bytes) -> Items:
    """Read a file's `meta` box.

    Raises:
        DamagedImageError: it has none, says a thing in two ways, or has more in its items than in the file.
        UnsupportedImageError: an animation.
        struct.error: a box ends before its content does.
    """
    top = list(_boxes(data, 0, len(data), whole=False))
    if _has(top, b"moov"):
        raise UnsupportedImageError("animations and films of this format are not supported")
    meta = _only(top, b"meta")
    parts = list(_boxes(data, meta.start + 4, meta.end))
    items, cursor = Items(), _Cursor(data, _only(parts, b"pitm"))
    version = cursor.version()
    items.primary = cursor.number(4 if version else 2)
    _read_kinds(data, _table(parts, b"iinf"), items)
    stored = _only(parts, b"idat") if _has(parts, b"idat") else Box(b"idat", 0, 0)
    _read_places(data, _table(parts, b"iloc"), stored, items)
    _read_properties(data, _only(parts, b"iprp"), items)
    items.groups = sum(box.end - box.start for box in parts if box.kind == b"grpl")
    if _has(parts, b"iref"):
        _read_references(data, _table(parts, b"iref"), items)
    return items


def _boxes(data: bytes, start: int, end: int, *, whole: bool = True) -> Iterator[Box]:
    """The boxes between two places; they fill it, unless `whole` is False: what is no box then ends them."""
    for _ in range(_MAX_BOXES):
        if start == end:
            return
        if start + 8 <= end:
            size, kind = struct.unpack_from(">I4s", data, start)
            head = 8
            if size == 1 and start + 16 <= end:
                (size,), head = struct.unpack_from(">Q", data, start + 8), 16
            elif size == 0:
                size = end - start
            if head <= size <= end - start:
                yield Box(kind, start + head, start + size)
                start += size
                continue
        if not whole:
            return
        raise DamagedImageError("damaged image: a box is longer than the one that it is in")
    raise DamagedImageError(f"the image has more than {_MAX_BOXES:,} boxes")


def _only(boxes: list[Box], kind: bytes) -> Box:
    found = [box for box in boxes if box.kind == kind]
    if len(found) != 1:
        raise DamagedImageError(f"damaged image: it has {len(found)} boxes {kind.decode()!r}")
    return found[0]


def _has(boxes: list[Box], kind: bytes) -> bool:
    return any(box.kind == kind for box in boxes)


def _table(boxes: list[Box], kind: bytes) -> Box:
    """The only box of a kind, which is a list of items."""
    box = _only(boxes, kind)
    if box.end - box.start > _MAX_TABLE:
        raise DamagedImageError(f"damaged image: its box {kind.decode()!r} is too long")
    return box


class _Cursor:
    """Reads the numbers in a box, one after the other."""

    def __init__(self, data: bytes, box: Box) -> None:
        self._data = data
        self.place, self._end = box.start, box.end

    def number(self, size: int) -> int:
        """The next `size` bytes, which may be none.

        Raises:
            struct.error: the box ends before.
        """
        if self.place + size > self._end:
            raise struct.error("the box is too short")
        value = int.from_bytes(self._data[self.place : self.place + size], "big")
        self.place += size
        return value

    def version(self) -> int:
        """The version, with which most boxes begin; flags follow it."""
        version = self.number(1)
        self.number(3)
        return version


def _require_new(item: int, known: Collection[int]) -> None:
    if item in known:
        raise DamagedImageError(f"damaged image: item {item} comes twice")
    if len(known) == _MAX_ITEMS:
        raise DamagedImageError(f"the image has more than {_MAX_ITEMS:,} items")


def _read_kinds(data: bytes, box: Box, items: Items) -> None:
    cursor = _Cursor(data, box)
    cursor.number(4 if cursor.version() else 2)
    for entry in _boxes(data, cursor.place, box.end):
        inner = _Cursor(data, entry)
        version = inner.version()
        if version not in (2, 3):
            raise DamagedImageError("damaged image: an item is of no kind")
        item = inner.number(2 if version == 2 else 4)
        inner.number(2)
        _require_new(item, items.kinds)
        items.kinds[item] = inner.number(4).to_bytes(4, "big")


def _read_places(data: bytes, box: Box, stored: Box, items: Items) -> None:
    cursor = _Cursor(data, box)
    version = cursor.version()
    sizes = cursor.number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    total = 0
    for _ in range(cursor.number(4 if version == 2 else 2)):
        item = cursor.number(4 if version == 2 else 2)
        method = cursor.number(2) & 15 if version else _IN_FILE
        elsewhere, base, extents = cursor.number(2), cursor.number(base_size), cursor.number(2)
        if elsewhere or extents != 1 or method not in (_IN_FILE, _IN_META):
            raise UnsupportedImageError("images in pieces, or partly in other files, are not supported")
        if version:
            cursor.number(index_size)
        offset, length = base + cursor.number(offset_size), cursor.number(length_size)
        first, last = (0, len(data)) if method == _IN_FILE else stored[1:]
        end = first + offset + length if length else last
        if end > last:
            raise DamagedImageError("damaged image: it is truncated")
        _require_new(item, items.places)
        items.places[item] = first + offset, end
        total += end - first - offset
    if total > len(data):
        raise DamagedImageError("damaged image: there is more in its items than in the file")


def _read_properties(data: bytes, box: Box, items: Items) -> None:
    parts = list(_boxes(data, box.start, box.end))
    container, cursor = _only(parts, b"ipco"), _Cursor(data, _table(parts, b"ipma"))
    known = list(_boxes(data, container.start, container.end))
    version = cursor.number(1)
    wide = cursor.number(3) & 1
    for _ in range(cursor.number(4)):
        item = cursor.number(4 if version else 2)
        _require_new(item, items.properties)
        numbers = [
            cursor.number(2) & 0x7FFF if wide else cursor.number(1) & 0x7F for _ in range(cursor.number(1))
        ]
        if any(number > len(known) for number in numbers):
            raise DamagedImageError("damaged image: an item has a property that is not there")
        items.properties[item] = [known[number - 1] for number in numbers if number]


def _read_references(data: bytes, box: Box, items: Items) -> None:
    cursor = _Cursor(data, box)
    size = 4 if cursor.version() else 2
    for entry in _boxes(data, cursor.place, box.end):
        inner = _Cursor(data, entry)
        source = inner.number(size)
        targets = tuple(inner.number(size) for _ in range(inner.number(2)))
        items.references.append(Reference(entry.kind, source, targets))
    if sum(len(each.targets) for each in items.references) > _MAX_TARGETS:
        raise DamagedImageError(f"the image has more than {_MAX_TARGETS:,} references between its items")
