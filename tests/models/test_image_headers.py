"""Headers tell what decoding takes before a decoder sees the file, and nothing makes reading them dear."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin, TiffImagePlugin

from benchmarks import hostile_images as hostile
from benchmarks.decoding_cost import files
from benchmarks.hostile_images import chunk, noise, saved
from models.images.decoding import decode
from models.images.formats import FORMATS, read_header
from models.images.metadata import orientation
from models.images.png import PngHeader
from models.preprocessing import (
    Cost,
    DamagedImageError,
    ImageError,
    Preprocessing,
    UnsupportedImageError,
    load_pixels,
    plan_loading,
)
from server.settings import Settings

SPEC = Preprocessing(resize=32, height=32, width=32)
IMAGENET = Preprocessing(resize=256, height=224, width=224)
DEFAULTS = Settings()

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16")
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma", "jpeg")
KINDS: list[tuple[str, dict[str, Any]]] = [
    *((form, {}) for form in FORMATS),
    ("JPEG", {"progressive": True}),
    ("WEBP", {"lossless": True}),
    ("GIF", {"interlace": True}),
    *(("TIFF", {"compression": compression}) for compression in TIFF_COMPRESSIONS),
    ("TIFF", {"big_tiff": True}),
]


def cost(data: bytes, spec: Preprocessing = IMAGENET) -> Cost:
    return plan_loading(data, spec).cost


def is_within_defaults(foretold: Cost) -> bool:
    return (
        foretold.seconds <= DEFAULTS.max_decoding_ms / 1000
        and foretold.memory <= DEFAULTS.max_decoding_memory_bytes
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    mode=st.sampled_from(MODES),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    orientation=st.sampled_from([None, 3, 6]),
)
def test_the_size_is_the_one_that_pillow_finds(
    kind: tuple[str, dict[str, Any]], mode: str, width: int, height: int, orientation: int | None
) -> None:
    form, options = kind
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    try:
        image = Image.fromarray(noise(width, height)).convert("RGB" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image)[:, :, 0].astype(np.uint16))
        data = saved(image, form, exif=exif.tobytes(), **options)
    except (OSError, ValueError):
        assume(False)  # the format has no such mode
    header = read_header(data)
    with Image.open(io.BytesIO(data)) as opened:
        turned = form in ("TIFF", "HEIF") and orientation == 6  # Pillow tells the size after turning
        size = opened.size[::-1] if turned else opened.size
        padding = np.subtract((header.width, header.height), size)
        assert header.format == opened.format
        assert np.all(
            (padding >= 0) & (padding < (64 if form == "HEIF" else 1))
        )  # HEIC is cropped once decoded


@pytest.mark.parametrize("name", files(8, 8))
def test_what_is_foretold_covers_the_pixels_and_grows_with_them(name: str) -> None:
    small, large = (cost(files(side, side)[name](), SPEC) for side in (64, 256))
    assert large.seconds > small.seconds
    if not name.startswith("JPEG"):  # which is decoded at a smaller scale
        assert small.memory >= 3 * 64 * 64
        assert large.memory >= 3 * 256 * 256


SIDE = 1000
# Seconds that the core of `models.images.header` takes for a PNG of RGB pixels without filters.
ON_THAT_CORE = 12e-9 * SIDE * SIDE
MEASURED: dict[str, Callable[[], bytes]] = {
    "PNG of 16-bit RGBA, by the dearest filter": partial(
        hostile.png, SIDE, SIDE, depth=16, colour=6, row_filter=4
    ),
    "PNG of 16-bit grey and alpha, by that filter": partial(
        hostile.png, SIDE, SIDE, depth=16, colour=4, row_filter=4
    ),
    **{
        name: files(SIDE, SIDE)[name]
        for name in ("PNG Paeth", "PNG one bit", "PNG palette", "BMP run-length", "GIF flat", "WebP noise")
    },
}


@pytest.mark.parametrize("name", MEASURED)
def test_decoding_takes_no_longer_than_foretold_for_the_speed_of_the_machine(name: str) -> None:
    def seconds(data: bytes) -> float:
        began = time.thread_time()
        plan_loading(data, SPEC).load()
        return time.thread_time() - began

    unit, data = hostile.png(SIDE, SIDE), MEASURED[name]()
    rounds = [(seconds(unit), seconds(data)) for _ in range(5)]
    machine = min(of_unit for of_unit, _ in rounds) / ON_THAT_CORE
    assert min(of_file for _, of_file in rounds) <= machine * cost(data, SPEC).seconds


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_bytes_alone_are_a_damaged_image(form: str) -> None:
    data = saved(noise(8, 8), form)
    for length in range(2, 30):
        with pytest.raises(ImageError):
            load_pixels(data[:length], SPEC)


ORDINARY = {
    "12-megapixel PNG": hostile.png(4032, 3024, after=[chunk(b"IDAT", bytes(24 << 20))]),
    "48-megapixel JPEG": hostile.grey_jpeg(8000, 6000, (0x22, 0x11, 0x11)),
    "48-megapixel progressive JPEG": hostile.progressive_jpeg(8000, 6000, 3, refining=True),
    "12-megapixel WebP": saved(Image.new("L", (4032, 3024)), "WEBP", method=0),
    "12-megapixel TIFF": saved(Image.new("RGB", (4032, 3024)), "TIFF"),
    "bitmap of a screen": saved(Image.new("RGB", (1024, 768)), "BMP"),
    "12-megapixel run-length bitmap": hostile.run_length_bmp(4032, 3024),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_photographs_are_within_the_servers_limits(name: str) -> None:
    assert is_within_defaults(cost(ORDINARY[name]))


CMYK = saved(Image.new("CMYK", (16, 16)), "JPEG")


def with_segments(jpeg: bytes, segments: bytes) -> bytes:
    return jpeg[:2] + segments + jpeg[2:]


TAGS = hostile.tiff_tags(16, 16)
DEAR = {
    "TIFF of one huge tile": hostile.tiled_tiff(16, 16, 32_752),
    "TIFF of a million resolutions": hostile.tiff(TAGS | {282: (5, 1 << 20, 8)}, bytes(9 << 20)),
    "TIFF of a million strips": hostile.tiff(
        hostile.tiff_tags(1, 1) | {273: (4, 1 << 20, 8), 278: (4, 1, 1)}, bytes(5 << 20), offset_tag=700
    ),
    "tiny WebP of 64 megapixels": saved(Image.new("L", (16_383, 3900)), "WEBP", lossless=True),
    "run-length bitmap": hostile.run_length_bmp(30_000, 2133),
    "JPEG of 900 scans": hostile.progressive_jpeg(8000, 8000, 900),
    "JPEG of 900 refining scans": hostile.progressive_jpeg(2000, 2000, 900, refining=True),
    "PNG of 16-bit channels": hostile.png(5000, 5000, depth=16, colour=6),
    "PNG of profiles": hostile.png(8, 8, before=[chunk(b"iCCP", b"a\0\0" + bytes(9))] * 300),
    "JPEG of tables": with_segments(CMYK, hostile.segment(0xDB, bytes(65 * 1000)) * 170),
}


@pytest.mark.parametrize("name", DEAR)
def test_files_that_cost_too_much_are_known_by_their_headers(name: str) -> None:
    assert not is_within_defaults(cost(DEAR[name]))


PNG = hostile.png(8, 8, before=[chunk(b"iCCP", b"a\0\0" + bytes(9))] * 300)
# By its length the header ends behind what looks like one chunk that hides all others.
LONGER_HEADER = PNG[:8] + chunk(b"IHDR", PNG[16:33] + struct.pack(">I", 1 << 30) + b"abCd") + PNG[33:]
LONG = {
    "PNG of chunks": hostile.png(8, 8, before=[chunk(b"tEXt")] * 60_000),
    "PNG whose header hides chunks": LONGER_HEADER,
    "PNG of two headers": hostile.png(8, 8, before=[hostile.png(9, 9)[8:33]]),
    "JPEG of comments": b"\xff\xd8" + b"\xff\xfe\0\2" * (1 << 20),
    "JPEG of fill bytes": b"\xff\xd8" + b"\xff" * (1 << 20),
    "JPEG of stuffed bytes": b"\xff\xd8\xff\xfe\0\2" + b"\xff\0" * (1 << 20),
    "JPEG of zeros": b"\xff\xd8\xff\xfe\0\2" + bytes(1 << 20),
    "JPEG of scans": hostile.progressive_jpeg(8, 8, 1) + b"\xff\xda" * (1 << 20),
    "GIF of comments": b"GIF89a" + bytes(7) + b"!\xfe" + b"\1x" * (1 << 20),
    "GIF of zeros": b"GIF89a" + bytes(1 << 20),
    "WebP of chunks": b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(10) + b"ABCD\0\0\0\0" * (1 << 18),
    "TIFF of tags": hostile.tiff(TAGS | dict.fromkeys(range(1000, 3000), (13, 1, 7))),
    "TIFF whose tags share their data": hostile.tiff(
        TAGS | dict.fromkeys(range(1000, 1100), (7, 1 << 16, 8)), bytes(1 << 16)
    ),
    "TIFF of strips without rows": hostile.tiff(TAGS | {278: (4, 1, 0)}),
}


@pytest.mark.parametrize("name", LONG)
def test_headers_too_long_to_be_true_are_refused(name: str) -> None:
    with pytest.raises(DamagedImageError):
        read_header(LONG[name])


NOTES = {
    "EXIF data": (0xE1, b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x11A, 5, 1, 26) + bytes(12)),
    "further pictures": (0xE2, b"MPF\0II*\0" + struct.pack("<IHHHII", 8, 1, 0xB001, 4, 1, 2) + bytes(4)),
    "Photoshop's notes": (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed" + bytes(20)),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_that_pillow_would_read_in_python_are_kept_from_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is of them, it takes no time."""

    def read(*_arguments: object) -> None:
        raise AssertionError("it reads them")

    monkeypatch.setattr(Image.Exif, "load", read)
    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", read)
    monkeypatch.setattr(JpegImagePlugin, "i32", read)
    data = with_segments(CMYK, hostile.segment(*NOTES[name]))
    np.testing.assert_array_equal(load_pixels(data, SPEC), load_pixels(CMYK, SPEC))


def test_an_orientation_is_found_behind_a_few_prefixes_and_many_take_no_time() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = exif.tobytes().removeprefix(b"Exif\0\0")
    assert [orientation(b"Exif\0\0" * prefixes + found) for prefixes in (0, 1, 3)] == [6, 6, 6]
    began = time.thread_time()
    assert orientation(b"Exif\0\0" * 500_000 + found) is None
    assert time.thread_time() - began < 1  # a hundred times as long as it takes


def test_a_tiff_whose_tag_comes_twice_is_refused() -> None:
    data = bytearray(hostile.tiff(hostile.tiff_tags(16, 16), bytes(256)))
    data[10 + 12 : 10 + 14] = struct.pack("<H", 256)  # the second tag's number: the width again
    with pytest.raises(DamagedImageError, match="tag 256 comes twice"):
        read_header(bytes(data))


def test_an_animation_is_dearer_than_a_picture() -> None:
    picture = Image.new("RGB", (640, 480))
    still = cost(saved(picture, "WEBP"))
    moving = cost(saved(picture, "WEBP", save_all=True, append_images=[Image.new("RGB", (640, 480), "red")]))
    assert moving.seconds > 5 * still.seconds


def test_a_format_can_be_left_out() -> None:
    data = saved(noise(8, 8), "GIF")
    with pytest.raises(
        UnsupportedImageError, match="GIF images are not accepted; convert it to one of JPEG, PNG"
    ):
        plan_loading(data, SPEC, formats={"JPEG", "PNG"})


@pytest.mark.parametrize(
    "sampling", [(0x14, 0x11, 0x11), (0x11, 0x21, 0x21), (0x41, 0x11, 0x11), (0x22, 0x21, 0x11)]
)
def test_unusual_jpeg_sampling_is_read(sampling: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(load_pixels(hostile.grey_jpeg(96, 64, sampling), SPEC), 128)


@pytest.mark.parametrize("place", [20, -2], ids=["between segments", "before the end"])
def test_jpegs_with_bytes_that_belong_to_nothing_are_read(place: int) -> None:
    data = saved(noise(300, 200), "JPEG", quality=95)  # its first segment ends at byte 20
    junk = data[:place] + bytes(20) + data[place:]
    difference = load_pixels(junk, SPEC).astype(int) - load_pixels(data, SPEC)
    assert np.abs(difference).max() <= 2  # another build of libjpeg


WHOLE: dict[str, Callable[[Image.Image], bytes]] = {
    "RGB": lambda image: saved(image, "PNG"),
    "grey": lambda image: saved(image.convert("L"), "PNG"),
    "palette": lambda image: saved(image.quantize(40), "PNG"),
    "transparent palette": lambda image: saved(image.quantize(40), "PNG", transparency=bytes(range(40))),
    "bilevel": lambda image: saved(image.convert("1"), "TIFF"),
    "CMYK": lambda image: saved(image.convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_an_image_converted_in_strips_is_the_image_converted_whole(kind: str) -> None:
    picture = Image.fromarray(noise(90, 130)).resize((900, 1300), Image.Resampling.NEAREST)
    data = WHOLE[kind](picture)
    with Image.open(io.BytesIO(data)) as whole:
        if kind == "transparent palette":
            whole = whole.convert("RGBA")
        expected = np.asarray(whole.convert("RGB"))
    spec = Preprocessing(resize=900, height=900, width=900)
    np.testing.assert_array_equal(load_pixels(data, spec), expected[200:1100])


SEEDS = [
    *(saved(noise(40, 30), form, **options) for form, options in KINDS),
    saved(Image.new("RGB", (9, 9)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
    hostile.progressive_jpeg(40, 30, 4, refining=True),
    hostile.tiled_tiff(16, 16, 64),
    hostile.run_length_bmp(9, 9),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage that is made here
@settings(deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(
        st.tuples(
            st.integers(0, 300), st.sampled_from([b"\0", b"\1", b"\xff", b"\xff\xff", b"\xff" * 4, b"\x80"])
        ),
        max_size=6,
    ),
    cut=st.integers(1, 1500),
)
def test_any_damage_gives_a_cost_within_which_it_decodes_or_an_image_error(
    seed: bytes, changes: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(seed)
    for position, value in changes:
        place = position % len(data)
        data[place : place + len(value)] = value
    try:
        plan = plan_loading(bytes(data[:cut]), SPEC, max_pixels=1_000_000)
        if plan.cost.seconds < 0.1 and plan.cost.memory < 10_000_000:
            assert plan.load().shape == (32, 32, 3)
    except ImageError:
        pass


MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"RIFF1234WEBPVP8X",
    b"\0\0\0\x14ftypheic\0\0\0\0mif1\0\0\1\0meta\0\0\0\0",
    b"\0\0\0\x14ftypavif\0\0\0\0mif1\0\0\1\0meta\0\0\0\0",
)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=300))
def test_any_bytes_behind_a_formats_first_give_a_header_or_an_image_error(magic: bytes, rest: bytes) -> None:
    try:
        foretold = read_header(magic + rest).cost(32)
    except ImageError:
        return
    assert foretold.seconds >= 0
    assert foretold.memory >= 0


@st.composite
def _small_png(draw: st.DrawFn) -> bytes:
    """A PNG of a few pixels, with anything for its pixels, that may be damaged in any of the likely ways."""
    colour, depth = draw(st.sampled_from([(0, 1), (0, 8), (0, 16), (2, 8), (3, 2), (4, 8), (6, 8), (6, 16)]))
    width, height = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    row = (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8
    filters = st.integers(0, draw(st.sampled_from([4, 4, 5])))
    rows = [bytes([draw(filters)]) + draw(st.binary(min_size=row, max_size=row)) for _ in range(height)]
    pixels = zlib.compress(b"".join(rows[: draw(st.sampled_from([height, height, height - 1]))]))
    pixels = pixels[: -draw(st.sampled_from([0, 0, 0, 1, 4])) or None] + draw(
        st.sampled_from([b"", b"", b"x"])
    )
    method = draw(st.sampled_from([0, 0, 0, 1]))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, method, 0, 0)
    palette = chunk(b"PLTE", bytes(range(12))) if colour == 3 else b""
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", pixels) + chunk(b"IEND")
    for place in draw(st.lists(st.integers(33, len(file) - 1), max_size=1)):
        file = file[:place] + bytes([draw(st.integers(0, 255))]) + file[place + 1 :]
    return file


def test_small_pngs_are_what_pillow_makes_of_them_and_nothing_is_written_to_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    by_opencv = set[bool]()

    @settings(deadline=None, max_examples=1000, derandomize=True)
    @given(file=_small_png())
    def check(file: bytes) -> None:
        header = read_header(file)
        assert isinstance(header, PngHeader)
        by_opencv.add(header.plain and header.is_sound(file))
        try:
            with Image.open(io.BytesIO(file)) as opened:
                image = opened.copy()
                deep = image.mode.startswith("I;16")
                grey = (np.asarray(image) >> 8).astype(np.uint8) if deep else np.empty(0)
                expected = np.repeat(grey[:, :, None], 3, 2) if deep else np.asarray(image.convert("RGB"))
        except Exception:
            with pytest.raises(DamagedImageError):
                decode(file, header)
        else:
            assert np.array_equal(decode(file, header), expected)

    check()
    assert by_opencv == {True, False}
    assert capfd.readouterr().err == ""


def test_a_servers_decoders_write_nothing_to_standard_error() -> None:
    code = """
import io
import pillow_heif
from PIL import Image
from models.preprocessing import ImageError, Preprocessing, load_pixels
from models.images.process import configure_decoders
configure_decoders()
spec = Preprocessing(resize=8, height=8, width=8)
bad_exif = b"Exif\\0\\0II*\\0" + bytes([8, 0, 0, 0, 9, 9] * 9)
picture = Image.linear_gradient("L")
for form, mode, options in (
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {}),
    ("WEBP", "RGB", {}),
    ("PNG", "RGB", {}),
    ("JPEG", "RGB", {"exif": bad_exif}),
    ("AVIF", "RGB", {}),
    ("HEIF", "RGB", {}),
):
    file = io.BytesIO()
    image = picture.convert(mode)
    if form == "HEIF":  # Pillow has nothing registered for it here, nor does it need that
        pillow_heif.from_pillow(image).save(file)
    else:
        image.save(file, form, **options)
    whole = file.getvalue()
    for damage in range(min(500, len(whole))):
        data = bytearray(whole[: 2000 if damage % 2 else len(whole)])
        data[damage % len(data)] ^= 0xFF
        try:
            load_pixels(bytes(data), spec)
        except ImageError:
            pass
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (said.returncode, said.stderr) == (0, "")
