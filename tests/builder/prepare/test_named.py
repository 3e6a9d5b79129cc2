"""Files of weights: whose network they are of, what it is given, and what does not fit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from builder import BuildOptions, PrepareOptions, build
from builder.prepare.export import ExportError, run_onnx
from builder.prepare.named import open_weights
from models.datasets import DataSplit
from models.networks import NetworkError, create_network
from models.preprocessing import IMAGENET_MEAN
from runtime.manifest import read_manifest

ARCHITECTURE = "squeezenet1_1"
SIZE = PrepareOptions(data="digits", image_size="32", architecture=ARCHITECTURE)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_network(ARCHITECTURE, 10).eval()


@pytest.fixture(scope="module")
def lightning(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "epoch=3.ckpt"
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, path)
    return path


def test_a_file_becomes_the_network_that_it_was_saved_from(
    data: DataSplit, network: nn.Module, lightning: Path, tmp_path: Path
) -> None:
    subject = open_weights(lightning, SIZE)
    subject.export(tmp_path / "master.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    spec = subject.student.preprocessing
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        expected = network(images).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "master.onnx", pixels), expected, rtol=1e-3, atol=1e-3)


def test_what_was_taken_is_told(data: DataSplit, lightning: Path) -> None:
    subject = open_weights(lightning, SIZE)
    weights, images, labels = subject.notes
    assert weights == (
        "weights: 52 tensors of 'state_dict', names without 'model.'; squeezenet1_1 with 10 classes"
    )
    assert images.startswith("images: the shorter side becomes 37, then the middle 32x32 (bilinear); RGB, ")
    assert images.endswith("(torchvision)")
    assert labels.startswith("labels: the folders of digits")
    assert subject.student.name == "epoch-3"
    assert subject.student.source == f"torchvision:squeezenet1_1 with {lightning.resolve()}"


def test_a_file_that_does_not_name_its_network_needs_a_name(data: DataSplit, lightning: Path) -> None:
    with pytest.raises(NetworkError, match=r"does not say which network .*--architecture, such as resnet18"):
        open_weights(lightning, PrepareOptions(data="digits"))


def test_another_network_is_told_from_it(data: DataSplit, lightning: Path) -> None:
    with pytest.raises(
        NetworkError, match=r"does not fit squeezenet1_0: of its tensors, .* of another shape"
    ):
        open_weights(lightning, SIZE.model_copy(update={"architecture": "squeezenet1_0"}))


def test_the_head_counts_the_classes(data: DataSplit, tmp_path: Path) -> None:
    torch.save(create_network(ARCHITECTURE, 7).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ExportError, match="the network has 7 classes and the data has 10 folders"):
        open_weights(tmp_path / "weights.pth", SIZE)


def test_labels_in_the_file_are_taken(data: DataSplit, network: nn.Module, tmp_path: Path) -> None:
    order = {str(digit): place for place, digit in enumerate(reversed(range(10)))}
    torch.save({"model": network.state_dict(), "class_to_idx": order}, tmp_path / "weights.pth")
    subject = open_weights(tmp_path / "weights.pth", SIZE)
    assert subject.student.labels == list("9876543210")
    assert subject.classes is not None
    assert subject.classes.tolist() == list(range(9, -1, -1))


def test_one_logit_is_two_classes(data: DataSplit, tmp_path: Path, two_digits: str) -> None:
    network = create_network(ARCHITECTURE, 1).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    subject = open_weights(tmp_path / "weights.pth", SIZE.model_copy(update={"data": two_digits}))
    assert subject.student.labels == ["0", "1"]
    logits = subject.reference(np.full((2, 32, 32, 3), 200, np.uint8))
    assert logits.shape == (2, 2)
    assert not logits[:, 0].any()


@pytest.fixture
def two_digits(data: DataSplit, tmp_path: Path) -> str:
    folder = tmp_path / "two"
    for label in ("0", "1"):
        (folder / label).mkdir(parents=True)
        chosen = [data.train.paths[i] for i in np.flatnonzero(data.train.targets == int(label))[:12]]
        for path in chosen:
            (folder / label / path.name).hardlink_to(path)
    return str(folder)


def test_timms_checkpoint_says_all(data: DataSplit, tmp_path: Path) -> None:
    network = create_network("timm:test_resnet", 10)
    content = {
        "arch": "test_resnet",
        "state_dict": network.state_dict(),
        "version": 2,
        "args": argparse.Namespace(img_size=96, mean=[0.5, 0.5, 0.5], crop_pct=1.0, model_kwargs={}),
    }
    torch.save(content, tmp_path / "model_best.pth.tar")
    student = open_weights(tmp_path / "model_best.pth.tar", PrepareOptions(data="digits")).student
    spec = student.preprocessing
    assert (student.name, spec.height, spec.resize, spec.mean) == ("model_best", 96, 96, (0.5, 0.5, 0.5))


def test_a_folder_of_hugging_face_says_all(data: DataSplit, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = {
        "architecture": "test_resnet",
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.5, "interpolation": "bilinear"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(
        create_network("timm:test_resnet", 10).state_dict(), folder / "model.safetensors"
    )
    student = open_weights(folder, PrepareOptions(data="digits")).student
    spec = student.preprocessing
    assert (student.name, spec.height, spec.resize, spec.interpolation) == ("my-model", 64, 128, "bilinear")


def test_a_folder_of_transformers_is_refused_with_the_way_to_onnx(
    data: DataSplit, network: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        NetworkError, match=r"ViTForImageClassification of transformers\..*optimum-cli export onnx"
    ):
        open_weights(tmp_path, PrepareOptions(data="digits"))


def test_options_change_what_the_architecture_is_given(data: DataSplit, lightning: Path) -> None:
    asked = SIZE.model_copy(update={"resize": "squash", "interpolation": "bicubic"})
    spec = open_weights(lightning, asked).student.preprocessing
    assert (spec.fit, spec.interpolation, spec.height, spec.mean) == ("squash", "bicubic", 32, IMAGENET_MEAN)
    with pytest.raises(ExportError, match="--resize 16 is smaller than the input 32x32"):
        open_weights(lightning, SIZE.model_copy(update={"resize": "16"}))


def test_a_size_that_the_architecture_cannot_take(data: DataSplit, tmp_path: Path) -> None:
    torch.save(create_network("timm:deit_tiny_patch16_224", 10).state_dict(), tmp_path / "weights.pth")
    asked = PrepareOptions(data="digits", architecture="timm:deit_tiny_patch16_224", image_size="32")
    with pytest.raises(ExportError, match="deit_tiny_patch16_224 cannot take 32x32 images"):
        open_weights(tmp_path / "weights.pth", asked)


def test_an_engine_is_built_from_a_file_of_weights(lightning: Path, data: DataSplit, tmp_path: Path) -> None:
    options = SIZE.model_copy(update={"verification_images": 64, "allow_low_accuracy": True})
    (package,) = build(
        lightning, tmp_path, BuildOptions(precisions=("fp32",), target="openvino", prepare=options)
    )
    manifest = read_manifest(package.folder)
    assert "--architecture squeezenet1_1" in manifest.build_command
