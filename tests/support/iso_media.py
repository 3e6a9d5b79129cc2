"""HEIC and AVIF files put together from coded pictures, in ways that no encoder would."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from models.images.items import read_items


def box(kind: bytes, content: bytes = b"", *, flags: int | None = None, version: int = 0) -> bytes:
    """A box; one of those with a version if `flags` are given."""
    if flags is not None:
        content = struct.pack(">I", version << 24 | flags) + content
    return struct.pack(">I4s", 8 + len(content), kind) + content


def size(width: int, height: int) -> bytes:
    """The property that says how large an image is."""
    return box(b"ispe", struct.pack(">II", width, height), flags=0)


@dataclass
class Item:
    """One item, of the number that is its place in the file, from 1 on."""

    kind: bytes
    data: bytes
    properties: Sequence[bytes]


@dataclass
class File:
    """A file whose first item is the shown one.

    Attributes:
        items: in order; the brand is that of what they code.
        references: kind, source and targets.
        beside: boxes at the top.
        within: boxes in `meta`, beside those that are needed.
    """

    items: list[Item]
    references: list[tuple[bytes, int, Sequence[int]]] = field(default_factory=list)
    beside: bytes = b""
    within: bytes = b""

    def write(self) -> bytes:
        """Its bytes."""
        brand = b"avif" if any(item.kind == b"av01" for item in self.items) else b"heic"
        head = box(b"ftyp", brand + bytes(4) + b"mif1" + brand)
        return (
            head + self._meta(len(head) + len(self._meta(0)) + 8) + box(b"mdat", self._data()) + self.beside
        )

    def _data(self) -> bytes:
        return b"".join(item.data for item in self.items)

    def _meta(self, offset: int) -> bytes:
        count = struct.pack(">H", len(self.items))
        kinds, places, owners, known = b"", b"", b"", b""
        numbers = 0
        for number, item in enumerate(self.items, 1):
            entry = struct.pack(">HH", number, 0) + item.kind + b"\0"
            kinds += box(b"infe", entry, flags=0, version=2)
            places += struct.pack(">HHHII", number, 0, 1, offset, len(item.data))
            own = range(numbers + 1, numbers + 1 + len(item.properties))
            owners += struct.pack(f">HB{len(own)}H", number, len(own), *own)
            known += b"".join(item.properties)
            numbers += len(item.properties)
            offset += len(item.data)
        links = b"".join(
            box(kind, struct.pack(f">HH{len(targets)}H", source, len(targets), *targets))
            for kind, source, targets in self.references
        )
        return box(
            b"meta",
            box(b"hdlr", bytes(4) + b"pict" + bytes(13), flags=0)
            + box(b"pitm", struct.pack(">H", 1), flags=0)
            + box(b"iinf", count + kinds, flags=0)
            + box(b"iloc", b"\x44\0" + count + places, flags=0)
            + box(b"iprp", box(b"ipco", known) + box(b"ipma", bytes(2) + count + owners, flags=1))
            + box(b"iref", links, flags=0)
            + self.within,
            flags=0,
        )


def picture(file: bytes) -> Item:
    """The coded picture of a file that an encoder wrote."""
    items = read_items(file)
    start, end = items.places[items.primary]
    properties = [file[each.start - 8 : each.end] for each in items.properties[items.primary]]
    return Item(items.kinds[items.primary], file[start:end], properties)


def grid(rows: int, columns: int, width: int, height: int) -> Item:
    """An image that is made of tiles."""
    data = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
    return Item(b"grid", data, [size(width, height)])
