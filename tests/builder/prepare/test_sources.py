"""torchvision and timm models by name, with weights from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from builder.prepare.export import ExportError, run_onnx
from builder.prepare.named import open_named
from builder.prepare.options import PrepareOptions
from builder.prepare.sources import open_data
from builder.prepare.unlabelled import open_unlabelled
from models.datasets import DatasetError, DataSplit, open_dataset
from models.networks import NetworkError


@pytest.fixture(scope="module")
def small_images(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("preprocessing") / "small.json"
    path.write_text(json.dumps({"resize": 32, "height": 32, "width": 32}))
    return str(path)


def weights_of(network: torch.nn.Module, folder: Path) -> str:
    path = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return str(path)


def test_a_torchvision_model_by_name(data: DataSplit, small_images: str, tmp_path: Path):
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(num_classes=10).eval()
    options = PrepareOptions(data="digits", preprocess=small_images, weights=weights_of(network, tmp_path))
    subject = open_named("torchvision:squeezenet1_1", options)
    assert subject.student.name == "squeezenet1_1"
    assert subject.student.labels == list(data.labels)
    assert subject.student.parameters == sum(p.numel() for p in network.parameters())
    subject.export(tmp_path / "master.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    logits = run_onnx(tmp_path / "master.onnx", pixels)
    np.testing.assert_allclose(logits, subject.reference(pixels), rtol=1e-3, atol=1e-3)


def test_a_timm_model_by_name_has_timms_preprocessing(data: DataSplit, tmp_path: Path):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'trimrt[timm]'")
    network = timm.create_model("test_resnet", num_classes=10)
    config = timm.data.resolve_model_data_config(network)
    options = PrepareOptions(data="digits", weights=weights_of(network, tmp_path))
    student = open_named("timm:test_resnet", options).student
    assert student.name == "test_resnet"
    assert (student.preprocessing.height, student.preprocessing.width) == config["input_size"][1:]
    assert student.preprocessing.mean == pytest.approx(config["mean"])
    assert student.preprocessing.resize >= student.preprocessing.height
    assert student.preprocessing.interpolation == config["interpolation"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet18_x", "torchvision has no classifier 'resnet18_x'"),
        ("timm:resnet18_x", "timm has no classifier 'resnet18_x'"),
    ],
)
def test_an_unknown_model_is_refused(data: DataSplit, tmp_path: Path, source: str, message: str):
    if source.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed: pip install 'trimrt[timm]'")
    with pytest.raises(NetworkError, match=message):
        open_named(source, PrepareOptions(data="digits", weights=str(tmp_path / "weights.safetensors")))


def test_weights_of_another_number_of_classes_are_refused(data: DataSplit, small_images: str, tmp_path: Path):
    weights = weights_of(torchvision.models.squeezenet1_1(num_classes=7), tmp_path)
    options = PrepareOptions(data="digits", preprocess=small_images, weights=weights)
    with pytest.raises(ExportError, match="the network has 7 classes and the data has 10 folders"):
        open_named("torchvision:squeezenet1_1", options)


def test_weights_and_data_are_asked_for():
    with pytest.raises(ExportError, match="needs weights: --weights FILE"):
        open_named("torchvision:resnet18", PrepareOptions(data="digits"))
    with pytest.raises(DatasetError, match="needs --data"):
        open_named("torchvision:resnet18", PrepareOptions(weights="file"))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of ten images, one damaged image and one file that is none."""
    for label, grey in (("dark", 0), ("light", 100)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(10):
            Image.new("L", (40, 40), grey + index).save(tmp_path / "photos" / label / f"{index}.png")
    (tmp_path / "photos" / "dark" / "damaged.png").write_bytes(b"")
    (tmp_path / "photos" / "Thumbs.db").write_bytes(b"")
    return tmp_path / "photos"


def test_damaged_photographs_are_named_or_left_out(small_images: str, photographs: Path, tmp_path: Path):
    network = torchvision.models.squeezenet1_1(num_classes=2)
    options = PrepareOptions(
        data=str(photographs),
        preprocess=small_images,
        weights=weights_of(network, tmp_path),
        allow_low_accuracy=True,
    )
    with pytest.raises(DatasetError, match=r"an empty file \(1\): dark/damaged.png"):
        open_named("torchvision:squeezenet1_1", options)
    data = open_named("torchvision:squeezenet1_1", options.model_copy(update={"on_damaged": "skip"})).data
    assert data.damaged == 1
    assert data.summary[0] == "photos: 20 images, of 2 classes; the smallest is dark (10)"


def test_unsorted_photographs_are_looked_through_too(photographs: Path):
    with pytest.raises(DatasetError, match=r"an empty file \(1\): dark/damaged.png"):
        open_unlabelled(str(photographs))
    data = open_unlabelled(str(photographs), "skip")
    assert (len(data.train), len(data.validation), data.damaged) == (10, 10, 1)
    assert data.summary[0] == "photos: 20 images, without labels"
    assert any("Thumbs.db" in line for line in data.summary)


class TestParts:
    """A network from elsewhere was not trained on the photographs, so as many judge as calibrate."""

    @pytest.fixture
    def pages(self, tmp_path: Path) -> str:
        """Two classes of sixty images."""
        for label, first in (("upright", 0), ("upside-down", 60)):
            (tmp_path / "pages" / label).mkdir(parents=True)
            for grey in range(first, first + 60):
                Image.new("L", (8, 8), grey).save(tmp_path / "pages" / label / f"{grey}.png")
        return str(tmp_path / "pages")

    def test_half_calibrates_and_half_judges_of_every_class(self, pages: str):
        data = open_data(PrepareOptions(data=pages))
        assert np.bincount(data.train.targets).tolist() == [24, 24]
        assert np.bincount(data.validation.targets).tolist() == [24, 24]
        assert not set(data.train.paths) & set(data.validation.paths)
        assert "validation: 50% of the training part" in data.description

    def test_images_to_test_on_are_those_of_a_training(self, pages: str):
        assert open_data(PrepareOptions(data=pages)).test.paths == open_dataset(pages).test.paths

    def test_fine_tuning_has_what_a_training_has(self, pages: str):
        tuned, trained = open_data(PrepareOptions(data=pages, qat=True)), open_dataset(pages)
        assert (tuned.train.paths, tuned.validation.paths) == (trained.train.paths, trained.validation.paths)
