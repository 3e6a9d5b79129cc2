"""How a network gets its images is read as the library reads it that trained the network."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from builder.prepare.export import ExportError
from builder.prepare.normalisations import (
    NORMALISATIONS,
    Resizing,
    find_preprocessing,
    read_preprocessing,
    told_size,
)
from models.preprocessing import Preprocessing, load_pixels


def photograph(width: int = 90, height: int = 60) -> Image.Image:
    random = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(random).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(spec: Preprocessing, image: Image.Image) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "PNG")
    return load_pixels(file.getvalue(), spec)


def found(tmp_path: Path, content: dict[str, Any] | str, size: tuple[int, int] = (32, 32), name="file.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_preprocessing(str(path), Resizing(), *size).spec


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("crop_pct", "mode", "interpolation"),
    [(0.875, "center", "bicubic"), (1.0, "center", "bilinear"), (0.9, "squash", "bicubic")],
)
def test_timms_file_gives_the_pixels_that_timms_transform_gives(
    tmp_path: Path, crop_pct: float, mode: str, interpolation: str
) -> None:
    timm_data = pytest.importorskip("timm.data", reason="timm is not installed: pip install 'trimrt[timm]'")
    config = {
        "input_size": [3, 32, 32], "crop_pct": crop_pct, "crop_mode": mode, "interpolation": interpolation,
        "mean": IMAGENET[0], "std": IMAGENET[1],
    }  # fmt: skip
    spec = found(tmp_path, {"architecture": "resnet18", "pretrained_cfg": config})
    image = photograph(64, 64) if mode == "squash" else photograph()
    options = {**config, "input_size": (3, 32, 32), "crop_pct": 1.0 if mode == "squash" else crop_pct}
    expected = timm_data.create_transform(**options)(image)
    own = (
        torch.from_numpy(pixels_of(spec, image)).permute(2, 0, 1) / 255
        - torch.tensor(spec.mean)[:, None, None]
    )
    own /= torch.tensor(spec.std)[:, None, None]
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
            transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32)]),
        ),
        ({"size": {"height": 32, "width": 32}}, transforms.Resize((32, 32))),
        ({"size": 32}, transforms.Resize((32, 32))),
        (
            {"size": {"height": 40, "width": 40}, "crop_size": 32, "do_center_crop": True},
            transforms.Compose([transforms.Resize((40, 40)), transforms.CenterCrop(32)]),
        ),
        (
            {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
            transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32)]),
        ),
    ],
    ids=["shorter side and crop", "squash", "squash by one number", "squash and crop", "crop_pct"],
)
def test_hugging_faces_file_gives_the_pixels_that_its_processors_give(
    tmp_path: Path, fields, expected
) -> None:
    spec = found(
        tmp_path,
        {"image_processor_type": "ViTImageProcessor", "resample": 2, "image_mean": [0.5] * 3, **fields},
    )
    np.testing.assert_array_equal(pixels_of(spec, photograph()), np.asarray(expected(photograph())))
    assert spec.mean == pytest.approx((0.5, 0.5, 0.5))


def test_hugging_faces_scale_and_order_of_channels_count(tmp_path: Path) -> None:
    content = {"do_normalize": True, "image_mean": 127.5, "image_std": 127.5, "do_rescale": False, "size": 32}
    spec = found(tmp_path, {**content, "do_flip_channel_order": True})
    assert spec.mean == pytest.approx((0.5, 0.5, 0.5))
    assert spec.channels == "BGR"


def test_paddles_file_is_read(tmp_path: Path) -> None:
    text = """
    PreProcess:
      transform_ops:
      - ResizeImage: {resize_short: 40}
      - CropImage: {size: 32}
      - NormalizeImage: {scale: 1.0/255.0, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], order: ''}
      - ToCHWImage:
    """
    spec = found(tmp_path, text, name="inference.yml")
    assert (spec.resize, spec.height, spec.fit) == (40, 32, "crop")
    assert spec.mean == pytest.approx(IMAGENET[0])
    assert spec.std == pytest.approx(IMAGENET[1])


def test_paddles_file_may_squash_and_crop(tmp_path: Path) -> None:
    text = "PreProcess: {transform_ops: [{ResizeImage: {size: 40}}, {CropImage: {size: 32}}]}"
    spec = found(tmp_path, text, name="inference.yml")
    assert (spec.fit, spec.squashed, spec.height) == ("squash", (40, 40), 32)


def test_a_way_of_resizing_that_is_named_decodes_large_jpegs_in_full(tmp_path: Path) -> None:
    named = {"resize": 40, "interpolation": "bicubic"}
    assert not found(tmp_path, named).scaled_decoding
    assert found(tmp_path, {**named, "scaled_decoding": True}).scaled_decoding
    assert read_preprocessing("imagenet", Resizing(), 32, 32).spec.scaled_decoding
    assert not read_preprocessing("imagenet", Resizing(None, "bilinear"), 32, 32).spec.scaled_decoding


def test_ultralytics_metadata_are_read(tmp_path: Path) -> None:
    taken = find_preprocessing(None, Resizing(), {"task": "classify"}, tmp_path, (64, 64), "RGB")
    assert taken is not None
    assert (taken.spec.mean, taken.spec.std) == ((0, 0, 0), (1, 1, 1))
    assert (taken.spec.resize, taken.spec.interpolation) == (64, "bilinear")
    assert told_size(None, {"imgsz": "[224, 160]"}, tmp_path) == (224, 160)


def test_a_file_beside_the_model_is_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"do_normalize": True, "size": {"height": 32, "width": 40}}))
    taken = find_preprocessing(None, Resizing(), {}, tmp_path, (32, 40), "RGB")
    assert taken is not None
    assert str(path) in str(taken)
    assert told_size(None, {}, tmp_path) == (32, 40)
    assert find_preprocessing(None, Resizing(), {}, tmp_path / "elsewhere", (32, 40), "RGB") is None
    path.rename(tmp_path / "config.json").write_text('{"learning_rate": 0.1}')  # of anything
    assert find_preprocessing(None, Resizing(), {}, tmp_path, (32, 40), "RGB") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": [123.7, 116.3, 103.5], "std": [58, 57, 57]}, 'pixels from 0 to 255; add "range": 255'),
        ({"resize": 20}, "resize 20 is smaller than the crop 32x32"),
        ({"resize": 40, "height": 48, "width": 48}, "for images of 48x48, the network takes 32x32"),
        ({"resize": 40, "sizes": 3}, "Extra inputs are not permitted"),
        ({"model_type": "vit", "architectures": []}, "describes no preprocessing"),
        ([1], "it is no mapping"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path: Path, content, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        found(tmp_path, content)


def test_mean_and_std_of_pixels_up_to_255_are_taken_with_their_range(tmp_path: Path) -> None:
    spec = found(tmp_path, {"resize": 40, "range": 255, "mean": [127.5], "std": 51})
    assert spec.mean == pytest.approx((0.5, 0.5, 0.5))
    assert spec.std == pytest.approx((0.2, 0.2, 0.2))


@pytest.mark.parametrize(
    ("size", "fit", "resize"),
    [((224, 224), "crop", 256), ((24, 24), "crop", 24), ((48, 192), "squash", 192)],
)
def test_a_name_says_how_images_get_their_size_by_that_of_the_network(size, fit: str, resize: int) -> None:
    spec = read_preprocessing("0..1", Resizing(), *size).spec
    assert (spec.fit, spec.resize) == (fit, resize)


@pytest.mark.parametrize("resize", ["40", "squash", "letterbox", "none"])
def test_resize_overrides_what_a_name_or_file_says(resize: str) -> None:
    taken = read_preprocessing("caffe", Resizing(resize, "bicubic"), 32, 32)
    assert (taken.spec.fit, taken.spec.resize) == (("crop", 40) if resize == "40" else (resize, 32))
    assert taken.spec.mean == NORMALISATIONS["caffe"].mean
    assert taken.spec.interpolation == "bicubic"
