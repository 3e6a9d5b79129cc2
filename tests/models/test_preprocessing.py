"""One preprocessing: whatever the file's format, the same upright RGB pixels, or an error that says why."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from models.preprocessing import (
    FORMATS,
    DamagedImageError,
    ImageError,
    ImageTooLargeError,
    Preprocessing,
    UnsupportedImageError,
    load_pixels,
)

SIDE = 32
SPEC = Preprocessing(resize=SIDE, height=SIDE, width=SIDE)

# What puts an upright image the way that each EXIF orientation says it was stored (the inverse of
# EXIF 2.32, section 4.6.4), written with NumPy alone.
STORED_AS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def scene(height: int = SIDE, width: int = SIDE) -> NDArray[np.uint8]:
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return np.stack([255 * y, 255 * x, 127 * (x + y * y)], axis=2).astype(np.uint8)


def encode(pixels: NDArray[Any] | Image.Image, image_format: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "GIF": {}}
LOSSY = {
    "JPEG": {"quality": 98, "subsampling": 0},
    "WEBP": {"quality": 98},
    "HEIF": {"quality": 98, "subsampling": "4:4:4"},
    "AVIF": {"quality": 98, "subsampling": "4:4:4"},
}


class TestFormats:
    @pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF"])
    def test_lossless_files_give_their_own_pixels(self, image_format: str) -> None:
        data = encode(scene(), image_format, **LOSSLESS[image_format])
        np.testing.assert_array_equal(load_pixels(data, SPEC), scene())

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
    def test_pixels_go_where_they_are_wanted(self, image_format: str) -> None:
        data = encode(scene(2 * SIDE, 3 * SIDE), image_format)
        batch = np.zeros((3, SIDE, SIDE, 3), np.uint8)
        row = batch[1]
        assert load_pixels(data, SPEC, out=row) is row
        np.testing.assert_array_equal(batch[1], load_pixels(data, SPEC))
        assert not batch[[0, 2]].any()

    @pytest.mark.parametrize("image_format", LOSSY)
    def test_lossy_files_come_close(self, image_format: str) -> None:
        pixels = load_pixels(encode(scene(), image_format, **LOSSY[image_format]), SPEC)
        assert np.abs(pixels.astype(int) - scene()).mean() < 3

    def test_gif_gives_its_palette_colours(self) -> None:
        image = Image.fromarray(scene()).quantize(64)
        np.testing.assert_array_equal(
            load_pixels(encode(image, "GIF"), SPEC), np.asarray(image.convert("RGB"))
        )

    def test_result_is_writable_contiguous_uint8(self) -> None:
        pixels = load_pixels(encode(scene(), "PNG"), SPEC)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable

    @pytest.mark.parametrize("orientation", STORED_AS)
    @pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "JPEG", "HEIF", "AVIF"])
    def test_orientation_is_undone(self, image_format: str, orientation: int) -> None:
        upright = scene(SIDE, 48)
        options = (LOSSY | LOSSLESS)[image_format]
        tags = exif(orientation).tobytes()  # of which HEIC and AVIF make properties of their own
        data = encode(STORED_AS[orientation](upright), image_format, exif=tags, **options)
        pixels = load_pixels(data, SPEC)
        error = np.abs(pixels.astype(int) - upright[:, 8:40])
        assert error.max() <= (0 if image_format in LOSSLESS else 6)

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_orientation_that_does_not_exist_is_ignored(self, orientation: int) -> None:
        np.testing.assert_array_equal(
            load_pixels(encode(scene(), "PNG", exif=exif(orientation)), SPEC), scene()
        )

    @pytest.mark.parametrize(
        "before",
        [
            b"",
            b"\xff\xfe\x00\x06text",
            b"\xff\xff\xff",
            b"\xff\xe1\x00\x06http",
            b"\xff\xe2\xff\xff" + bytes(65_533),
        ],
    )
    def test_jpeg_orientation_is_found_behind_other_segments(self, before: bytes) -> None:
        plain = encode(scene(), "JPEG", quality=98, subsampling=0)
        data = encode(scene(), "JPEG", quality=98, subsampling=0, exif=exif(6))
        turned = load_pixels(data[:2] + before + data[2:], SPEC)
        np.testing.assert_array_equal(turned, load_pixels(plain, SPEC).transpose(1, 0, 2)[:, ::-1])

    def test_grey_is_repeated_in_three_channels(self) -> None:
        grey = scene()[:, :, 0]
        for image_format in ("PNG", "TIFF", "BMP"):
            pixels = load_pixels(encode(grey, image_format), SPEC)
            np.testing.assert_array_equal(pixels, np.repeat(grey[:, :, None], 3, axis=2))
        pixels = load_pixels(encode(grey, "JPEG", quality=98), SPEC)
        assert np.abs(pixels.astype(int) - grey[:, :, None]).max() <= 4

    @pytest.mark.parametrize(("image_format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
    def test_16_bits_are_scaled_not_clipped(self, image_format: str, dtype: str) -> None:
        grey = (scene()[:, :, 0].astype(np.uint16) * 256 + 17).astype(dtype)
        pixels = load_pixels(encode(grey, image_format), SPEC)
        np.testing.assert_array_equal(pixels[:, :, 0], scene()[:, :, 0])

    def test_16_bit_colour_keeps_its_upper_half(self) -> None:
        wide = scene().astype(np.uint16) * 256 + 17
        np.testing.assert_array_equal(load_pixels(png_16_bit(wide), SPEC), scene())

    def test_bilevel(self) -> None:
        black_and_white = scene()[:, :, 0] > 99
        pixels = load_pixels(encode(Image.fromarray(black_and_white), "PNG"), SPEC)
        np.testing.assert_array_equal(pixels[:, :, 1], np.where(black_and_white, 255, 0))

    def test_alpha_is_dropped_and_colour_stays(self) -> None:
        with_alpha = np.dstack([scene(), scene()[:, :, 0]])
        for image_format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
            np.testing.assert_array_equal(
                load_pixels(encode(with_alpha, image_format, **options), SPEC), scene()
            )

    @pytest.mark.parametrize("transparency", [3, bytes(range(32))], ids=["one index", "a table"])
    def test_palette_with_transparency(self, transparency: int | bytes) -> None:
        image = Image.fromarray(scene()).quantize(32)
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(
            load_pixels(encode(image, "PNG", transparency=transparency), SPEC), expected
        )

    @pytest.mark.parametrize("orientation", STORED_AS)
    def test_orientation_of_a_jpeg_in_cmyk_is_undone(self, orientation: int) -> None:
        upright = scene(SIDE, 48)
        stored = Image.fromarray(STORED_AS[orientation](upright)).convert("CMYK")
        data = encode(stored, "JPEG", exif=exif(orientation).tobytes(), quality=98, subsampling=0)
        assert np.abs(load_pixels(data, SPEC).astype(int) - upright[:, 8:40]).mean() < 6

    def test_cmyk(self) -> None:
        image = Image.fromarray(scene()).convert("CMYK")
        pixels = load_pixels(encode(image, "JPEG", quality=98), SPEC)
        assert np.abs(pixels.astype(int) - scene()).mean() < 4

    @pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_first_frame_of_an_animation(self, image_format: str) -> None:
        first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
        data = encode(first, image_format, save_all=True, append_images=[second], **LOSSLESS[image_format])
        np.testing.assert_array_equal(load_pixels(data, SPEC)[0, 0], (255, 0, 0))


def png_16_bit(pixels: NDArray[np.uint16]) -> bytes:
    """16-bit RGB, which Pillow reads but does not write (PNG specification, sections 5 and 11)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


class TestSizes:
    def test_halving_is_the_mean_of_four(self) -> None:
        large = np.random.default_rng(0).integers(0, 256, (2 * SIDE, 2 * SIDE, 3), np.uint8)
        means = large.reshape(SIDE, 2, SIDE, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(load_pixels(encode(large, "PNG"), SPEC), means, atol=0.51)

    def test_enlarging_is_bilinear(self) -> None:
        small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(small).permute(2, 0, 1)[None].float(), (SIDE, SIDE), mode="bilinear"
        )[0].permute(1, 2, 0)
        np.testing.assert_allclose(load_pixels(encode(small, "PNG"), SPEC), expected, atol=1.01)

    @pytest.mark.parametrize(("height", "width"), [(64, 100), (100, 64), (33, 64), (64, 33)])
    def test_shorter_side_is_fitted_and_the_middle_kept(self, height: int, width: int) -> None:
        spec = Preprocessing(resize=64, height=48, width=40)
        shorter = min(height, width)
        expected_height, expected_width = int(64 * height / shorter), int(64 * width / shorter)
        # Brightness tells the column (red) and the row (green), so that the crop's place can be read off.
        pixels = load_pixels(encode(scene(height, width), "PNG"), spec)
        assert pixels.shape == (48, 40, 3)
        top, left = round((expected_height - 48) / 2), round((expected_width - 40) / 2)
        reference = scene(expected_height, expected_width)[top : top + 48, left : left + 40]
        assert np.abs(pixels.astype(int) - reference).max() <= 6

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
    def test_one_pixel_fills_the_input(self, image_format: str) -> None:
        pixels = load_pixels(encode(Image.new("RGB", (1, 1), (90, 90, 90)), image_format), SPEC)
        np.testing.assert_allclose(pixels, 90, atol=1)

    @pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
    def test_a_thread_of_pixels_costs_no_memory(self, size: tuple[int, int]) -> None:
        # Resized in full to 224 rows, it would take nine gigabytes.
        spec = Preprocessing(resize=224, height=224, width=224)
        pixels = load_pixels(encode(Image.new("RGB", size, (9, 8, 7)), "JPEG", quality=98), spec)
        np.testing.assert_allclose(pixels.mean(axis=(0, 1)), (9, 8, 7), atol=2)

    def test_scaled_decoding_keeps_the_picture(self) -> None:
        data = encode(scene(600, 800), "JPEG", quality=95)
        full = SPEC.model_copy(update={"scaled_decoding": False})
        difference = load_pixels(data, SPEC).astype(int) - load_pixels(data, full)
        assert np.abs(difference).max() <= 6

    @pytest.mark.parametrize(
        "wrong",
        [
            {"resize": 20, "height": 24, "width": 16},
            {"resize": 0, "height": 0, "width": 0},
            {"resize": 24, "height": 24, "width": 24, "std": (0.2, 0.0, 0.2)},
            {"resize": 24, "height": 24, "width": 24, "mean": (0.2, float("nan"), 0.2)},
            {"resize": 24, "height": 24, "width": 24, "std": (0.2, float("inf"), 0.2)},
            {"resize": 24, "height": 24, "width": 24, "antialias": True},
        ],
    )
    def test_values_that_make_no_sense_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Preprocessing(**wrong)


class TestRefusals:
    @pytest.mark.parametrize("image_format", FORMATS)
    @pytest.mark.parametrize("share", [0.3, 0.6])
    @pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")  # Pillow's, beside its error
    def test_truncated(self, image_format: str, share: float) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        data = encode(noise, image_format)
        with pytest.raises(DamagedImageError):
            load_pixels(data[: int(len(data) * share)], SPEC)

    @pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"<svg/>", b"MZ" + bytes(100)])
    def test_not_an_image(self, data: bytes) -> None:
        with pytest.raises(DamagedImageError):
            load_pixels(data, SPEC)

    def test_corrupt_header(self) -> None:
        data = bytearray(encode(scene(), "PNG"))
        data[20] ^= 0xFF
        with pytest.raises(DamagedImageError):
            load_pixels(bytes(data), SPEC)

    @pytest.mark.parametrize("mode", ["F", "I"])
    def test_32_bits(self, mode: str) -> None:
        with pytest.raises(UnsupportedImageError, match="32-bit"):
            load_pixels(encode(Image.new(mode, (SIDE, SIDE)), "TIFF"), SPEC)

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (b"\0\0\0\x18ftypisom" + bytes(40), "a video or another ISO media file"),
            (b"\xff\x0a" + bytes(40), "JPEG XL"),
            (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
            (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
            (b"8BPS\0\1" + bytes(40), "Photoshop"),
            (b"%PDF-1.7\n", "PDF"),
        ],
    )
    def test_a_format_that_is_not_accepted_is_named(self, data: bytes, kind: str) -> None:
        with pytest.raises(UnsupportedImageError, match=kind):
            load_pixels(data, SPEC)

    @pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
    def test_too_many_pixels(self, image_format: str) -> None:
        data = encode(Image.new("L", (101, 100)), image_format)
        load_pixels(data, SPEC, max_pixels=10_100)
        with pytest.raises(ImageTooLargeError, match=r"101x100 = 10,100 pixels; the limit is 10,099"):
            load_pixels(data, SPEC, max_pixels=10_099)

    def test_a_bomb_is_refused_by_its_header(self) -> None:
        # 100 megapixels claimed by a header and not one of them there: anything but the header's check
        # would call it damaged.
        header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
        content = b"IHDR" + header
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
        data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        with pytest.raises(ImageTooLargeError):
            load_pixels(data, SPEC)


SAMPLES = [
    encode(scene(), image_format, **options)
    for image_format, options in [
        *LOSSLESS.items(),
        ("JPEG", {"exif": exif(6)}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ]
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage that is made here
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.binary(max_size=200))
@example(data=b"\xff\xd8\xff\xe0")
def test_any_bytes_give_pixels_or_an_image_error(data: bytes) -> None:
    _check(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage that is made here
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    sample=st.sampled_from(SAMPLES),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    length=st.integers(0, 4000),
)
def test_any_damage_gives_pixels_or_an_image_error(
    sample: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(sample)
    for position, value in changes:
        data[position % len(data)] = value
    _check(bytes(data[:length]))


def _check(data: bytes) -> None:
    try:
        pixels = load_pixels(data, SPEC, max_pixels=1_000_000)
    except ImageError:
        return
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels.dtype == np.uint8


# How an image gets the network's size


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _blocks(height: int, width: int) -> np.ndarray:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("how", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_squash_is_pillows_resize_of_both_sides(how: str) -> None:
    image = _blocks(60, 90)
    spec = Preprocessing(height=32, width=48, fit="squash", interpolation=how)
    expected = Image.fromarray(image).resize((48, 32), Image.Resampling[how.upper()])
    np.testing.assert_array_equal(load_pixels(_png(image), spec), np.asarray(expected))


def test_squash_to_more_than_the_input_is_followed_by_a_crop() -> None:
    image = _blocks(60, 90)
    spec = Preprocessing(resize=40, height=32, width=32, fit="squash", interpolation="bilinear")
    expected = Image.fromarray(image).resize((40, 40), Image.Resampling.BILINEAR).crop((4, 4, 36, 36))
    np.testing.assert_array_equal(load_pixels(_png(image), spec), np.asarray(expected))


def test_opencvs_bilinear_does_not_smooth() -> None:
    image = _blocks(120, 180)
    spec = Preprocessing(height=16, width=24, fit="squash", interpolation="opencv-bilinear")
    np.testing.assert_array_equal(load_pixels(_png(image), spec), cv2.resize(image, (24, 16)))


def test_squash_looks_at_all_of_a_very_long_image() -> None:
    image = np.zeros((10, 400, 3), np.uint8)
    image[:, 200:] = 255
    pixels = load_pixels(_png(image), Preprocessing(height=16, width=64, fit="squash"))
    assert pixels[:, :30].max() == 0
    assert pixels[:, 34:].min() == 255


def test_letterbox_keeps_all_of_the_image_and_its_shape() -> None:
    image = _blocks(60, 120)
    spec = Preprocessing(height=32, width=32, fit="letterbox", fill=(1, 2, 3), interpolation="bilinear")
    pixels = load_pixels(_png(image), spec)
    inner = Image.fromarray(image).resize((32, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels[8:24], np.asarray(inner))
    assert (np.concatenate([pixels[:8], pixels[24:]]) == (1, 2, 3)).all()


def test_none_takes_the_middle_and_fills_up_what_is_missing() -> None:
    image = _blocks(20, 50)
    pixels = load_pixels(_png(image), Preprocessing(height=30, width=40, fit="none", fill=(9, 9, 9)))
    np.testing.assert_array_equal(pixels[5:25], image[:, 5:45])
    assert (pixels[:5] == 9).all()


def test_a_jpeg_that_is_not_to_be_resized_is_not_decoded_at_a_smaller_scale() -> None:
    file = io.BytesIO()
    Image.fromarray(_blocks(400, 400)).save(file, "JPEG", quality=95)
    spec = Preprocessing(height=40, width=40, fit="none")
    whole = load_pixels(file.getvalue(), spec.model_copy(update={"height": 400, "width": 400}))
    np.testing.assert_array_equal(load_pixels(file.getvalue(), spec), whole[180:220, 180:220])


@pytest.mark.parametrize("fields", [{"fit": "stretch"}, {"fill": (0, 0, 256)}, {"interpolation": "cubic"}])
def test_a_preprocessing_that_does_not_exist_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"fit|fill|interpolation"):
        Preprocessing(resize=32, height=32, width=32, **fields)
