"""Every form of the formats that people's programs write gives the picture that was put in."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from models.preprocessing import DamagedImageError, Preprocessing, UnsupportedImageError, load_pixels

WIDTH, HEIGHT = 45, 34
WHOLE = Preprocessing(resize=HEIGHT, height=HEIGHT, width=HEIGHT)

ORIENTATIONS = range(1, 9)
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"JPEG {s}": ("JPEG", "RGB", {"subsampling": s}) for s in ("4:4:4", "4:2:2", "4:2:0")},
    "JPEG progressive": ("JPEG", "RGB", {"progressive": True}),
    "JPEG restarts": ("JPEG", "RGB", {"restart_marker_blocks": 2}),
    "JPEG RGB": ("JPEG", "RGB", {"keep_rgb": True}),
    "JPEG grey": ("JPEG", "L", {}),
    **{f"JPEG CMYK {s}": ("JPEG", "CMYK", {"subsampling": s}) for s in ("4:4:4", "4:2:0")},
    **{f"PNG {mode}": ("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "PNG palette of 4": ("PNG", "P", {"bits": 2}),
    **{f"TIFF {mode}": ("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")},
    **{
        f"TIFF {mode} {how}": ("TIFF", mode, {"compression": how})
        for mode in ("L", "RGB")
        for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma")
    },
    "TIFF JPEG": ("TIFF", "RGB", {"compression": "jpeg"}),
    "TIFF facsimile": ("TIFF", "1", {"compression": "group4"}),
    "TIFF big": ("TIFF", "RGB", {"big_tiff": True}),
    **{f"BMP {mode}": ("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")},
    "GIF": ("GIF", "P", {}),
    "GIF interlaced": ("GIF", "P", {"interlace": True}),
    "WebP": ("WEBP", "RGB", {}),
    "WebP lossless": ("WEBP", "RGB", {"lossless": True}),
    "WebP alpha": ("WEBP", "RGBA", {"lossless": True, "exact": True}),
    **{f"HEIC {mode}": ("HEIF", mode, {}) for mode in ("L", "LA", "RGB", "RGBA")},
    "HEIC 4:4:4": ("HEIF", "RGB", {"subsampling": "4:4:4"}),
    **{f"AVIF {mode}": ("AVIF", mode, {}) for mode in ("L", "RGB", "RGBA")},
    "AVIF 4:4:4": ("AVIF", "RGB", {"subsampling": "4:4:4"}),
}
TURNED = [name for name, (form, _, _) in FORMS.items() if form in ("JPEG", "PNG", "TIFF", "WEBP")]


def scene() -> NDArray[np.uint8]:
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
    return np.stack([250 * y, 250 * x, 120 * (x + y * y)], axis=2).astype(np.uint8)


def file(form: str, orientation: int = 1) -> bytes:
    image_format, mode, options = FORMS[form]
    image = Image.fromarray(scene())
    image = image.quantize(4 if "bits" in options else 64) if mode == "P" else image.convert(mode)
    if orientation > 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = options | {"exif": exif}
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """The middle square of the image, decoded whole and turned upright by Pillow."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    # torchvision rounds halves to even, and so do we.
    top, left = (round((side - HEIGHT) / 2) for side in pixels.shape[:2])
    return pixels[top : top + HEIGHT, left : left + HEIGHT]


@pytest.mark.parametrize(
    ("form", "orientation"),
    [*((form, 1) for form in FORMS), *((form, turned) for form in TURNED for turned in ORIENTATIONS[1:])],
)
def test_what_pillow_shows_is_what_the_network_gets(form: str, orientation: int) -> None:
    data = file(form, orientation)
    difference = np.abs(load_pixels(data, WHOLE).astype(int) - by_pillow(data))
    lossy = form == "WebP" or FORMS[form][0] in ("JPEG", "HEIF", "AVIF")
    assert difference.max() <= (3 if lossy else 0)  # other builds of the same decoders round differently


GREY = (np.arange(16 * 16) % 256).reshape(16, 16)
SMALL = Preprocessing(resize=16, height=16, width=16)
BLACK_IS_ZERO, WHITE_IS_ZERO, RGB, CMYK = 1, 0, 2, 5
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(
    order: str,
    bits: int,
    photometric: int,
    data: bytes,
    *,
    samples: int = 1,
    kind: int = UNSIGNED,
    planes: bool = False,
) -> bytes:
    """A TIFF of 16x16 pixels in one strip, written here, for few programs write all kinds."""
    values: dict[int, tuple[str, list[int]]] = {
        256: ("H", [16]),
        257: ("H", [16]),
        258: ("H", [bits] * samples),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", [0]),
        277: ("H", [samples]),
        278: ("H", [16]),
        279: ("I", [len(data)]),
        284: ("H", [2 if planes else 1]),
        338: ("H", [2]),
        339: ("H", [kind] * samples),
    }
    if samples not in (2, 4) or photometric == CMYK:
        del values[338]  # alpha
    behind = 8 + 2 + 12 * len(values) + 4
    outside = sum(
        struct.calcsize(f"{len(v)}{t}") for t, v in values.values() if struct.calcsize(f"{len(v)}{t}") > 4
    )
    values[273] = ("I", [behind + outside])
    entries = rest = b""
    for number, (kind_of_value, numbers) in values.items():
        packed = struct.pack(f"{order}{len(numbers)}{kind_of_value}", *numbers)
        if len(packed) > 4:
            packed, rest = struct.pack(f"{order}I", behind + len(rest)), rest + packed
        type_number = 3 if kind_of_value == "H" else 4
        entries += struct.pack(f"{order}HHI", number, type_number, len(numbers)) + packed.ljust(4, b"\0")
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IH", 8, len(values)) + entries + bytes(4) + rest + data


def deep(order: str, channels: int = 1) -> bytes:
    """`GREY` in 16 bits, with something in the lower half."""
    return np.repeat((GREY * 256 + 17)[:, :, None], channels, axis=2).astype(f"{order}u2").tobytes()


def packed_12_bits() -> bytes:
    first, second = GREY[:, ::2] << 4 | 3, GREY[:, 1::2] << 4 | 3
    return (
        np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
        .astype(np.uint8)
        .tobytes()
    )


PNG_FORMS = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 4: (2, (8, 16)), 6: (4, (8, 16))}
"""Channels and depths of each colour type but palettes."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(samples: NDArray[np.int64], depth: int, colour: int, *, interlaced: bool) -> bytes:
    """A PNG of samples of shape (height, width, channels), written here, for few programs write all kinds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    lines = b""
    for left, top, across, down in passes:
        for row in samples[top::down, left::across].reshape(-(-(len(samples) - top) // down), -1):
            bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
            lines += b"\0" + np.packbits(bits.astype(np.uint8).ravel()).tobytes()
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("interlaced", [False, True], ids=["in order", "interlaced"])
@pytest.mark.parametrize(
    ("colour", "depth"), [(colour, depth) for colour, (_, depths) in PNG_FORMS.items() for depth in depths]
)
def test_pngs_of_every_depth_keep_their_upper_bits(colour: int, depth: int, interlaced: bool) -> None:
    samples = np.repeat((GREY * 257 >> (16 - depth))[:, :, None], PNG_FORMS[colour][0], axis=2)
    pixels = load_pixels(png(samples, depth, colour, interlaced=interlaced), SMALL)
    expected = GREY if depth >= 8 else samples[:, :, 0] * 255 // (2**depth - 1)
    np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], 3, axis=2))


def test_a_png_of_a_depth_that_its_colours_cannot_have_is_damaged() -> None:
    with pytest.raises(DamagedImageError, match="no such colour type or bit depth"):
        load_pixels(png(GREY[:, :, None], 16, 3, interlaced=False), SMALL)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
class TestTiff:
    @pytest.mark.parametrize("white", [False, True], ids=["black is zero", "white is zero"])
    def test_grey_of_any_depth_has_its_zero_where_the_file_says(self, order: str, white: bool) -> None:
        photometric = WHITE_IS_ZERO if white else BLACK_IS_ZERO
        files = {
            1: (np.packbits(GREY > 99, axis=1).tobytes(), np.where(GREY > 99, 255, 0)),
            4: ((GREY[:, ::2] >> 4 << 4 | GREY[:, 1::2] >> 4).astype(np.uint8).tobytes(), (GREY >> 4) * 17),
            8: (GREY.astype(np.uint8).tobytes(), GREY),
            16: (deep(order), GREY),
        }
        if order == "<":
            files[12] = packed_12_bits(), GREY
        for bits, (data, expected) in files.items():
            pixels = load_pixels(tiff(order, bits, photometric, data), SMALL)
            np.testing.assert_array_equal(pixels[:, :, 0], 255 - expected if white else expected)

    @pytest.mark.parametrize("white", [False, True], ids=["black is zero", "white is zero"])
    def test_alpha_is_dropped_from_grey(self, order: str, white: bool) -> None:
        data = np.dstack([GREY, np.full_like(GREY, 9)]).astype(np.uint8).tobytes()
        pixels = load_pixels(
            tiff(order, 8, WHITE_IS_ZERO if white else BLACK_IS_ZERO, data, samples=2), SMALL
        )
        np.testing.assert_array_equal(pixels[:, :, 2], 255 - GREY if white else GREY)

    @pytest.mark.parametrize("samples", [3, 4])
    def test_16_bit_colour_keeps_its_upper_half(self, order: str, samples: int) -> None:
        pixels = load_pixels(tiff(order, 16, RGB, deep(order, samples), samples=samples), SMALL)
        np.testing.assert_array_equal(pixels, np.repeat(GREY[:, :, None], 3, axis=2))

    @pytest.mark.parametrize(
        ("bits", "kind", "name"),
        [
            (16, FLOAT, "16-bit floating-point"),
            (32, FLOAT, "32-bit floating-point"),
            (64, FLOAT, "64-bit floating-point"),
            (16, SIGNED, "16-bit signed"),
            (32, UNSIGNED, "32-bit"),
        ],
    )
    def test_what_has_no_8_bits_to_show_is_named(self, order: str, bits: int, kind: int, name: str) -> None:
        data = tiff(order, bits, BLACK_IS_ZERO, bytes(16 * 16 * bits // 8), kind=kind)
        with pytest.raises(UnsupportedImageError, match=f"{name} images are not supported; convert"):
            load_pixels(data, SMALL)

    def test_deep_planes_are_refused_for_pillow_mixes_them_up(self, order: str) -> None:
        data = tiff(order, 16, RGB, deep(order, 3), samples=3, planes=True)
        with pytest.raises(UnsupportedImageError, match="more than 8 bits in separate planes"):
            load_pixels(data, SMALL)

    def test_what_pillow_does_not_know_is_named_and_not_called_damaged(self, order: str) -> None:
        name = "little-endian" if order == "<" else "big-endian"
        for bits, samples in ((10, 1), (14, 1), (12, 3), (16, 2)):
            data = tiff(order, bits, BLACK_IS_ZERO, bytes(16 * 16 * 2 * samples), samples=samples)
            channels = f"{samples} channels? of {bits} bits"
            with pytest.raises(UnsupportedImageError, match=rf"{name} TIFFs of this kind \({channels}\)"):
                load_pixels(data, SMALL)

    def test_12_bits_are_read_in_one_order_and_named_in_the_other(self, order: str) -> None:
        data = tiff(order, 12, BLACK_IS_ZERO, packed_12_bits())
        if order == "<":
            np.testing.assert_array_equal(load_pixels(data, SMALL)[:, :, 0], GREY)
        else:
            with pytest.raises(UnsupportedImageError, match="convert it to 8 or 16 bits"):
                load_pixels(data, SMALL)


RUNS: dict[str, tuple[int, list[list[int]]]] = {
    "eight bits": (8, [[2, 1, 0, 0], [0, 3, 2, 3, 4, 0, 2, 5, 0, 0], [1, 6, 0, 2, 2, 0, 1, 7, 0, 1]]),
    "four bits": (
        4,
        [[2, 0x11, 0, 0], [0, 5, 0x23, 0x45, 0x50, 0, 0, 0], [1, 0x60, 0, 2, 2, 0, 1, 0x70, 0, 1]],
    ),
    "a step to the next row": (8, [[2, 1, 0, 2, 0, 1], [3, 5, 0, 0, 0, 4, 6, 0, 0, 7, 0, 1]]),
    "runs beyond the row": (8, [[2, 1, 9, 0, 0, 0], [4, 2, 3, 3, 0, 0], [1, 6, 8, 7, 0, 0, 0, 1]]),
}
SHOWN = {
    "eight bits": [[6, 0, 0, 7, 0], [2, 3, 4, 5, 5], [1, 1, 0, 0, 0]],
    "four bits": [[6, 0, 0, 7, 0], [2, 3, 4, 5, 5], [1, 1, 0, 0, 0]],
    "a step to the next row": [[6, 0, 0, 7, 0], [0, 0, 5, 5, 5], [1, 1, 0, 0, 0]],
    "runs beyond the row": [[6, 7, 7, 7, 7], [2, 2, 2, 2, 3], [1, 1, 0, 0, 0]],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_length_bitmap_has_its_runs_where_the_format_puts_them(name: str) -> None:
    """From the lowest row up: runs, literal pixels, ends of rows, and steps over pixels of colour 0."""
    bits, rows = RUNS[name]
    data = b"".join(map(bytes, rows))
    palette = np.random.default_rng(0).integers(0, 256, (1 << bits, 4), np.uint8)  # blue, green, red, -
    offset = 14 + 40 + palette.size
    info = struct.pack(
        "<IiiHHIIiiII", 40, 5, 3, 1, bits, 1 if bits == 8 else 2, len(data), 0, 0, 1 << bits, 0
    )
    file = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette.tobytes() + data
    spec = Preprocessing(height=3, width=5, resize=5, fit="none")
    np.testing.assert_array_equal(load_pixels(file, spec), palette[SHOWN[name], 2::-1])
