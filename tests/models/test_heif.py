"""HEIC and AVIF: what they take is known before a decoder sees them, whatever they are made of."""

from __future__ import annotations

import io
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pillow_heif
import pytest
from iso_media import File, Item, box, grid, picture, size
from PIL import Image, features

from benchmarks.hostile_images import noise, photograph, saved
from models.images.formats import read_header
from models.preprocessing import (
    Cost,
    DamagedImageError,
    Preprocessing,
    UnsupportedImageError,
    load_pixels,
    plan_loading,
)
from server.settings import Settings

SIDE = 128
SPEC = Preprocessing(resize=SIDE, height=SIDE, width=SIDE)
DEFAULTS = Settings()
FORMS = pytest.mark.parametrize("form", ["HEIF", "AVIF"])


@pytest.fixture(scope="module")
def pictures() -> dict[str, Item]:
    """A coded picture of 128x128 pixels, of each format."""
    return {form: picture(saved(photograph(SIDE, SIDE), form)) for form in ("HEIF", "AVIF")}


def cost(data: bytes) -> Cost:
    return plan_loading(data, SPEC).cost


def tiled(tile: Item, rows: int, columns: int) -> File:
    """An image of `rows` times `columns` tiles, which are all the same."""
    links = [(b"dimg", 1, [2] * (rows * columns))]
    return File([grid(rows, columns, SIDE * columns, SIDE * rows), tile], links)


@FORMS
def test_a_file_put_together_here_is_read_as_the_encoders_own(form: str, pictures: dict[str, Item]) -> None:
    file = File([pictures[form]]).write()
    assert (read_header(file).width, read_header(file).height) == (SIDE, SIDE)
    np.testing.assert_array_equal(
        load_pixels(file, SPEC), load_pixels(saved(photograph(SIDE, SIDE), form), SPEC)
    )


@pytest.mark.parametrize("mode", ["RGB;16", "L;16"])
def test_deep_channels_keep_their_upper_bits(mode: str) -> None:
    """As cameras write them, in 10 bits."""
    pixels = np.asarray(photograph(SIDE, SIDE), np.uint16)
    samples = (pixels if mode == "RGB;16" else pixels[:, :, 0]) << 8
    file = io.BytesIO()
    deep = pillow_heif.from_bytes(mode, (SIDE, SIDE), samples.tobytes())
    deep.save(file, quality=95, subsampling="4:4:4")
    expected = pixels if mode == "RGB;16" else pixels[:, :, :1]
    assert np.abs(load_pixels(file.getvalue(), SPEC).astype(int) - expected).mean() < 3


@FORMS
def test_every_tile_is_in_its_place(form: str) -> None:
    """Of phones' HEIC photographs each is a grid."""
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (120, 120, 120)]
    tiles = [picture(saved(np.full((SIDE, SIDE, 3), colour, np.uint8), form)) for colour in colours]
    file = File([grid(2, 2, 2 * SIDE, 2 * SIDE), *tiles], [(b"dimg", 1, [2, 3, 4, 5])]).write()
    pixels = load_pixels(file, Preprocessing(resize=2 * SIDE, height=2 * SIDE, width=2 * SIDE))
    middles = pixels[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].reshape(4, 3).astype(int)
    assert np.abs(middles - colours).max() < 12


@FORMS
def test_a_tile_counts_as_often_as_it_is_decoded(form: str, pictures: dict[str, Item]) -> None:
    few, many = (cost(tiled(pictures[form], rows, 8).write()) for rows in (1, 16))
    assert many.seconds > 12 * few.seconds
    assert many.memory > 12 * few.memory


@FORMS
def test_transparency_is_a_picture_too(form: str, pictures: dict[str, Item]) -> None:
    plain = File([pictures[form]])
    transparent = File([pictures[form]] * 2, [(b"auxl", 2, [1])])
    assert cost(transparent.write()).seconds > 1.5 * cost(plain.write()).seconds


@FORMS
def test_a_description_counts_for_every_image_that_it_describes(form: str, pictures: dict[str, Item]) -> None:
    """Each gets a copy, and Pillow reads EXIF data in Python."""
    remark = Item(b"Exif", bytes(1 << 20), [])
    alone, shared = (
        cost(File([*[pictures[form]] * 900, remark], [(b"cdsc", 901, list(range(1, 1 + count)))]).write())
        for count in (0, 900)
    )
    assert alone.memory < DEFAULTS.max_decoding_memory_bytes < shared.memory
    assert shared.seconds > alone.seconds + 0.5


@FORMS
def test_groups_count_for_every_image(form: str, pictures: dict[str, Item]) -> None:
    """Each gets a copy of all of them, whether it is in one or not."""
    group = box(b"altr", struct.pack(">II64I", 1, 64, *[1] * 64), flags=0)
    many = cost(File([pictures[form]] * 900, within=box(b"grpl", group * 90)).write())
    assert many.seconds > DEFAULTS.max_decoding_ms / 1000


def test_what_phones_keep_beside_a_photograph_costs_nothing(pictures: dict[str, Item]) -> None:
    """Depths and maps of brightness, which no decoder looks at unless it is asked to."""
    item = pictures["HEIF"]
    for name in (b"urn:com:apple:photo:2020:aux:hdrgainmap", b"urn:mpeg:hevc:2015:auxid:2"):
        beside = replace(item, properties=[*item.properties, box(b"auxC", name + b"\0", flags=0)])
        alone = cost(File([item]).write())
        both = cost(File([item, beside], [(b"auxl", 2, [1])]).write())
        assert both.seconds < 1.3 * alone.seconds


def test_frames_that_follow_each_other_in_one_picture_count_all(pictures: dict[str, Item]) -> None:
    once, often = (
        cost(File([replace(pictures["AVIF"], data=pictures["AVIF"].data * times)]).write())
        for times in (1, 5)
    )
    assert often.seconds > 4 * once.seconds


def test_parts_of_a_picture_may_each_be_all_of_it(pictures: dict[str, Item]) -> None:
    """Slices say themselves where they begin, and nobody has to stop them from doing all again."""
    item = pictures["HEIF"]
    (length,) = struct.unpack_from(">I", item.data)
    unit = item.data[4 : 4 + length]
    assert unit[2] & 0x80, "the first of its picture"
    later = unit[:2] + bytes([unit[2] & 0x7F]) + unit[3:]
    slices = item.data + (struct.pack(">I", length) + later) * 9
    once, often = (cost(File([replace(item, data=data)]).write()) for data in (item.data, slices))
    assert often.seconds > 6 * once.seconds


def of_size(item: Item, *sizes: tuple[int, int]) -> Item:
    rest = [each for each in item.properties if each[4:8] != b"ispe"]
    return replace(item, properties=[*rest, *(size(*each) for each in sizes)])


CONTRADICTIONS: dict[str, Callable[[Item], File]] = {
    "smaller than it is coded": lambda item: File([of_size(item, (16, 1))]),
    "larger than it is coded": lambda item: File([of_size(item, (SIDE + 1, SIDE))]),
    "two sizes": lambda item: File([of_size(item, (SIDE, SIDE), (SIDE, SIDE))]),
    "two lists of items": lambda item: File([item], within=box(b"iinf", bytes(2), flags=0)),
    "two lists of places": lambda item: File([item], within=box(b"iloc", bytes(4), flags=0)),
    "two lists of references": lambda item: File([item], within=box(b"iref", flags=0)),
    "two headers": lambda item: File([item], beside=box(b"meta", bytes(4))),
    "no picture": lambda item: File([replace(item, data=b"")]),
    "fewer tiles than the grid has": lambda item: File(
        [grid(2, 2, 2 * SIDE, 2 * SIDE), item], [(b"dimg", 1, [2, 2, 2])]
    ),
    "tiles that make up another image": lambda item: File(
        [of_size(grid(1, 2, SIDE, SIDE), (2 * SIDE, SIDE)), item], [(b"dimg", 1, [2, 2])]
    ),
    "more items than libheif reads": lambda item: File([item] * 1001),
    "more references than photographs have": lambda item: File([item] * 140, [(b"thmb", 2, [1] * 15)] * 134),
    "references that never end": lambda item: File([item], [(b"auxl", 1, [1] * 17_000)] * 2),
}


@FORMS
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_damaged(form: str, name: str, pictures: dict[str, Item]) -> None:
    with pytest.raises(DamagedImageError):
        read_header(CONTRADICTIONS[name](pictures[form]).write())


def test_items_that_share_their_bytes_are_damaged(pictures: dict[str, Item]) -> None:
    """A thousand descriptions of a megabyte each would fit into one."""
    remarks = [Item(b"Exif", bytes(5000), [])] * 2
    file = File([pictures["HEIF"], *remarks]).write()
    second, third = (
        file.index(struct.pack(">HHH", number, 0, 1), file.index(b"iloc")) + 6 for number in (2, 3)
    )
    shared = file[:third] + file[second : second + 4] + struct.pack(">I", 10_000) + file[third + 8 :]
    read_header(file)
    with pytest.raises(DamagedImageError, match="more in its items than in the file"):
        read_header(shared)


def test_pictures_behind_the_first_are_damaged(pictures: dict[str, Item]) -> None:
    with pytest.raises(DamagedImageError, match="2 pictures in one"):
        read_header(File([replace(pictures["HEIF"], data=2 * pictures["HEIF"].data)]).write())


def test_settings_in_the_middle_of_a_picture_are_damaged(pictures: dict[str, Item]) -> None:
    """They could make it another size."""
    item = pictures["HEIF"]
    settings = struct.pack(">IBBB", 3, 33 << 1, 1, 1)
    with pytest.raises(DamagedImageError, match="settings change within a picture"):
        read_header(File([replace(item, data=settings + item.data)]).write())


@FORMS
@pytest.mark.parametrize("kind", [b"iovl", b"iden", b"jpeg", b"unci"])
def test_an_image_made_in_another_way_is_named(form: str, kind: bytes, pictures: dict[str, Item]) -> None:
    file = File([Item(kind, bytes(20), [size(8, 8)]), pictures[form]], [(b"dimg", 1, [2])])
    with pytest.raises(UnsupportedImageError, match=f"{form} images of this kind are not supported"):
        read_header(file.write())


@FORMS
def test_a_film_is_named(form: str, pictures: dict[str, Item]) -> None:
    with pytest.raises(UnsupportedImageError, match="animations and films"):
        read_header(File([pictures[form]], beside=box(b"moov")).write())


@FORMS
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_known_by_its_header(form: str, share: float) -> None:
    data = saved(noise(80, 60), form)
    with pytest.raises(DamagedImageError):
        read_header(data[: int(share * len(data))])


@FORMS
def test_what_programs_leave_behind_the_end_is_no_damage(form: str, pictures: dict[str, Item]) -> None:
    file = File([pictures[form]]).write()
    np.testing.assert_array_equal(load_pixels(file + b"SEFT" * 9, SPEC), load_pixels(file, SPEC))


@FORMS
def test_the_dearest_header_is_read_in_a_moment(form: str, pictures: dict[str, Item]) -> None:
    """As many items as there may be, of as many units, with as many references."""
    item = pictures[form]
    unit = {"HEIF": struct.pack(">IBBB", 3, 1 << 1, 1, 1), "AVIF": b"\x7a\0"}[form]  # slices; padding
    tiles = [replace(item, data=unit * 12 + item.data)] * 990
    links = [(b"dimg", 1, list(range(2, 992))), *((b"auxl", place, [1]) for place in range(2, 992))]
    file = File([grid(99, 10, SIDE * 10, SIDE * 99), *tiles], links).write()
    began = time.thread_time()
    assert (read_header(file).width, read_header(file).height) == (10 * SIDE, 99 * SIDE)
    assert time.thread_time() - began < 2 * 0.25  # five times as long as it takes, for slow machines


def test_photographs_of_phones_are_within_the_servers_limits() -> None:
    """12 megapixels in tiles of 512, in 3 MB."""
    tile = picture(saved(Image.new("RGB", (512, 512)), "HEIF"))
    tiles, rest = [(b"dimg", 1, [2] * 48)], box(b"free", bytes(3_000_000))
    foretold = cost(File([grid(6, 8, 4032, 3024), tile], tiles, beside=rest).write())
    assert foretold.seconds < DEFAULTS.max_decoding_ms / 1000
    assert foretold.memory < DEFAULTS.max_decoding_memory_bytes


class TestWithoutTheExtra:
    def test_heic_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = saved(noise(8, 8), "HEIF")
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(UnsupportedImageError, match=r"not installed: pip install 'trimrt\[heif\]'"):
            load_pixels(data, SPEC)

    def test_avif_needs_none_but_a_pillow_that_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = saved(noise(8, 8), "AVIF")
        monkeypatch.setattr(features, "check", lambda _: False)
        with pytest.raises(UnsupportedImageError, match="a Pillow that was built with AVIF"):
            load_pixels(data, SPEC)


@FORMS
def test_brands_that_both_have_are_told_apart_by_the_others(form: str, pictures: dict[str, Item]) -> None:
    data = File([pictures[form]]).write()
    assert data[8:12] in (b"heic", b"avif")
    assert read_header(data[:8] + b"mif1" + data[12:]).format == form
