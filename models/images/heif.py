"""The header of a HEIC or AVIF image: one coded picture, or a grid of them, as phones write it."""

from __future__ import annotations

import itertools
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from models.images import av1, hevc
from models.images.errors import DamagedImageError, UnsupportedImageError
from models.images.header import Cost, Header
from models.images.items import Items, read_items

_LEFT_ALONE: Final = (b"urn:com:apple:photo:", b"urn:mpeg:hevc:2015:auxid:2\0")
_MAX_PADDING: Final = 64  # pixels of a coded picture beyond those that are shown, along a side


@dataclass(frozen=True)
class _Codec:
    """How one format codes pictures.

    Attributes:
        format: the format's name.
        item: the kind of items that hold coded pictures.
        settings: the property with the decoder's settings.
        read: width, height, and how often every pixel may be decoded, from settings and coded bytes.
        by_shown: bytes of memory for a shown pixel.
        by_decoded: bytes of memory for a decoded pixel.
        by_described: cost of a byte that describes an image: EXIF data, an XMP packet.
    """

    format: str
    item: bytes
    settings: bytes
    read: Callable[[bytes, bytes], tuple[int, int, int]]
    by_shown: int
    by_decoded: int
    by_described: Cost


# pillow-heif copies descriptions, also where many images share one. Pillow reads EXIF data in Python.
_HEVC: Final = _Codec("HEIF", b"hvc1", b"hvcC", hevc.read, 8, 6, Cost(1e-9, 1))
_AV1: Final = _Codec("AVIF", b"av01", b"av1C", av1.read, 12, 14, Cost(300e-9, 20))


def read_heif(data: bytes) -> Header:
    """See `models.images.formats.read_header`."""
    return _read(data, _HEVC)


def read_avif(data: bytes) -> Header:
    """See `models.images.formats.read_header`."""
    return _read(data, _AV1)


def _read(data: bytes, codec: _Codec) -> Header:
    items = read_items(data)
    width, height = _shown_size(data, items, items.primary)
    pictures = _pictures(data, items, codec)
    pixels = {item: _decoded_pixels(data, items, item, codec) for item in set(pictures)}
    decoded = sum(pixels[item] for item in pictures)
    # Each image's colour profile is copied, also where many share one.
    properties = itertools.chain.from_iterable(items.properties.values())
    profiles = sum(box.end - box.start for box in properties if box.kind == b"colr")
    described = sum(
        (items.places[it.source][1] - items.places[it.source][0]) * len(it.targets)
        for it in items.references
        if it.kind == b"cdsc" and it.source in items.places
    )
    grouped = items.groups * len(items.kinds)  # each image gets a copy of all groups
    seconds = (
        45e-9 * decoded
        + 80e-9 * len(data)
        + 10e-9 * width * height
        + codec.by_described.seconds * described
        + 200e-9 * grouped
    )
    memory = (
        codec.by_shown * width * height
        + codec.by_decoded * decoded
        + len(data)
        + profiles
        + codec.by_described.memory * described
        + 10 * grouped
    )
    return Header(codec.format, width, height, Cost(seconds, memory))


def _pictures(data: bytes, items: Items, codec: _Codec) -> list[int]:
    """The coded pictures that the shown image is made of, as often as they occur.

    Those of its auxiliary images are among them: transparency is decoded too.
    """
    auxiliary = defaultdict(list)
    for reference in items.references:
        if reference.kind == b"auxl" and not _is_left_alone(data, items, reference.source):
            for target in reference.targets:
                auxiliary[target].append(reference.source)
    pictures: list[int] = []
    images = [items.primary]
    known = set(images)
    for image in images:
        parts = _parts(data, items, image, codec)
        pictures += parts
        for part in {image, *parts}:
            new = [source for source in auxiliary[part] if source not in known]
            images += new
            known.update(new)
    return pictures


def _is_left_alone(data: bytes, items: Items, item: int) -> bool:
    """Whether an auxiliary image is decoded only for those who ask: depths, and maps of brightness."""
    names = [data[box.start + 4 : box.end] for box in items.properties.get(item, []) if box.kind == b"auxC"]
    return len(names) == 1 and names[0].startswith(_LEFT_ALONE)


def _parts(data: bytes, items: Items, image: int, codec: _Codec) -> Sequence[int]:
    """The coded pictures of an image: itself, or its tiles."""
    kind = items.kinds.get(image)
    if kind == codec.item:
        return [image]
    if kind == b"grid":
        start, _ = items.place(image)
        _, flags, rows, columns = struct.unpack_from(">BBBB", data, start)
        size = struct.unpack_from(">II" if flags & 1 else ">HH", data, start + 4)
        tiles = [
            target for each in items.references if each[:2] == (b"dimg", image) for target in each.targets
        ]
        if size != _shown_size(data, items, image) or len(tiles) != (rows + 1) * (columns + 1):
            raise DamagedImageError(f"damaged {codec.format}: its tiles do not make up the image")
        if all(items.kinds.get(tile) == codec.item for tile in tiles):
            return tiles
    raise UnsupportedImageError(f"{codec.format} images of this kind are not supported; convert it to JPEG")


def _shown_size(data: bytes, items: Items, item: int) -> tuple[int, int]:
    """Width and height, before the image is cropped or turned."""
    width, height = struct.unpack_from(">II", data, items.property(item, b"ispe").start + 4)
    return width, height


def _decoded_pixels(data: bytes, items: Items, item: int, codec: _Codec) -> int:
    settings = items.property(item, codec.settings)
    start, end = items.place(item)
    width, height, times = codec.read(data[settings.start : settings.end], data[start:end])
    shown = _shown_size(data, items, item)
    if not (0 <= width - shown[0] <= _MAX_PADDING and 0 <= height - shown[1] <= _MAX_PADDING):
        raise DamagedImageError(
            f"damaged {codec.format}: a picture has {width}x{height} pixels and says {shown[0]}x{shown[1]}"
        )
    return width * height * times
