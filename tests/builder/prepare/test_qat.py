"""Quantisation-aware training: what INT8 cannot carry is fine-tuned until it can, and nothing else is.

The network is the student that ships with TrimRT, with one channel in a residual block made a thousand
times larger: the same in floating point, and beyond the gate in INT8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result
from rich.progress import Progress
from torch import nn

from builder.compile.packages import Package, build_package
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate, GateError, compare
from builder.kit import INPUT, LOGITS, PROBABILITIES, Graph
from builder.prepare import qat
from builder.prepare.export import ExportError
from builder.prepare.legality import check_legality
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Preparation, open_checkpoint, prepare
from experiments.qat import write_outliers
from models.datasets import DataSplit, ImageSet
from models.evaluation import predict_logits
from models.preprocessing import Preprocessing
from models.pretrained import DIGITS_STUDENT
from models.recipe import Augmentation, Training
from models.training import Images
from runtime.loading import load_engine
from runtime.manifest import BatchSizes, read_manifest
from runtime.profiling import profile_layers

pytestmark = pytest.mark.slow

TRAINING = Training(epochs=6, learning_rate=2e-3, weight_decay=0)
BLOCKS = ("layer2.0",)
SPEC = Preprocessing(resize=16, height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a network is slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fragile(data: DataSplit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(DIGITS_STUDENT, tmp_path_factory.mktemp("fragile") / "fragile", BLOCKS)


@dataclass
class Built:
    """What building the fragile network with QAT did."""

    preparation: Preparation
    package: Package
    files: set[Path]

    def graph(self, method: str, rest: Any = "fp32") -> tuple[Graph, Path]:
        graphs = self.preparation.graphs("int8", rest)
        return next((g, path) for g, path in graphs if g.calibration and g.calibration.method == method)


@pytest.fixture(scope="module")
def built(fragile: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    files: set[Path] = set()
    load_pixels = ImageSet.load_pixels

    def watched(images: ImageSet, *arguments: Any, **options: Any) -> Any:
        files.update(images.paths)
        return load_pixels(images, *arguments, **options)

    options = PrepareOptions(
        calibration_images=64,
        calibration="max",
        correction=False,
        rounding=False,
        sensitivity=False,
        qat=True,
        qat_epochs=TRAINING.epochs,
        qat_learning_rate=TRAINING.learning_rate,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSet, "load_pixels", watched)
        subject = open_checkpoint(fragile, None)
        preparation = prepare(subject, tmp_path_factory.mktemp("workspace"), options, lambda _: None)
        package = build(preparation, tmp_path_factory.mktemp("engines"))
    return Built(preparation, package, files)


def build(preparation: Preparation, output: Path) -> Package:
    return build_package(
        preparation,
        open_target("openvino"),
        "int8",
        output,
        batch=BatchSizes(min=1, opt=8, max=16),
        gate=Gate(),
        command="trimrt build",
        report=lambda _: None,
    )


def without_qat(preparation: Preparation) -> Preparation:
    return replace(preparation, options=preparation.options.model_copy(update={"qat": False}))


def test_without_it_int8_fails_the_gate(built: Built, tmp_path: Path) -> None:
    without = without_qat(built.preparation)
    with pytest.raises(GateError, match=r"max \(\d+ s\): top-1 falls by"):
        build(without, tmp_path)


def test_with_it_an_engine_passes_that_is_int8_throughout(built: Built) -> None:
    evidence = built.package.manifest.evidence
    assert evidence is not None
    assert evidence.engine_top1 >= evidence.reference_top1 - 0.005
    assert evidence.label_agreement >= 0.98
    kernels = [
        layer.kernel
        for layer in profile_layers(built.package.folder, batch=1, runs=1)
        if layer.kind == "Convolution"
    ]
    assert len(kernels) == 20
    # OpenVINO writes "I8" for unsigned inputs, "i8" for signed ones, which it chooses with AMX.
    assert all(kernel.endswith(("I8", "i8")) for kernel in kernels), kernels


def test_the_manifest_says_that_it_was_trained_and_what_was_tried_before(
    built: Built, data: DataSplit
) -> None:
    calibration = read_manifest(built.package.folder).provenance.calibration
    assert calibration is not None
    assert (calibration.method, calibration.tried, calibration.images) == ("qat", ["max"], 64)
    assert calibration.fine_tuning is not None
    assert calibration.fine_tuning.epochs == TRAINING.epochs
    assert calibration.fine_tuning.images == len(data.train)
    assert calibration.fine_tuning.images_sha256 == data.train.sha256


def test_no_test_image_is_read(built: Built, data: DataSplit) -> None:
    assert set(data.train.paths) <= built.files
    assert not built.files & set(data.test.paths)


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_the_graph_has_the_form_that_every_target_takes(built: Built, rest: str) -> None:
    graph, path = built.graph("qat", rest)
    model = onnx.load(str(path))
    findings = check_legality(model)
    assert not findings.errors
    assert not findings.warnings
    (pixels,) = model.graph.input
    assert (pixels.name, pixels.type.tensor_type.elem_type) == (INPUT, onnx.TensorProto.UINT8)
    outputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    assert outputs == dict.fromkeys((LOGITS, PROBABILITIES), onnx.TensorProto.FLOAT)
    # One Q for a tensor, however many layers read it; no batch normalisation; weights in a byte each.
    quantised = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == len(set(quantised))
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    calibrated, _ = built.graph("max", rest)
    assert graph.weights_bytes <= 1.02 * calibrated.weights_bytes


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_tensorrt_takes_the_graph(built: Built, rest: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")
    _, path = built.graph("qat", rest)
    batch = BatchSizes(min=1, opt=8, max=16)
    artefact = open_target("tensorrt-rtx").compile(path, tmp_path, batch, lambda _: None)
    assert (tmp_path / artefact.file).stat().st_size > 0


def test_the_engine_is_better_than_a_calibrated_one(built: Built, tmp_path: Path) -> None:
    loose = Gate(max_drop=1, min_agreement=0)
    images = built.preparation.verification
    calibrated = replace(
        built.preparation, options=built.preparation.options.model_copy(update={"qat": False})
    )
    worse = build_package(
        calibrated,
        open_target("openvino"),
        "int8",
        tmp_path,
        batch=BatchSizes(min=1, opt=8, max=16),
        gate=loose,
        command="trimrt build",
        report=lambda _: None,
    )
    agreements = []
    for package in (worse, built.package):
        with closing(load_engine(package.folder)) as engine:
            agreements.append(compare(engine, images).label_agreement)
    assert agreements[1] > agreements[0] + 0.015


def test_the_graph_computes_what_the_training_saw(tmp_path: Path) -> None:
    quantised, pixels = fine_tune(Residual())
    seen = predict_logits(quantised, pixels, SPEC).numpy()
    qat.export_quantised(quantised, SPEC, tmp_path / "int8.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), options)
    (logits,) = session.run([LOGITS], {INPUT: pixels})
    np.testing.assert_allclose(logits, seen, atol=1e-5)


def test_the_same_seed_gives_the_same_graph(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        qat.export_quantised(fine_tune(Residual())[0], SPEC, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_network_itself_is_left_as_it_was() -> None:
    network = Residual().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fine_tune(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_batch_normalisation_without_a_convolution_before_it_keeps_its_statistics(tmp_path: Path) -> None:
    quantised, _ = fine_tune(Residual())
    assert not [module for module in quantised.modules() if isinstance(module, nn.BatchNorm2d)]
    qat.export_quantised(quantised, SPEC, tmp_path / "int8.onnx")
    assert not check_legality(onnx.load(str(tmp_path / "int8.onnx"))).errors


def test_a_network_that_looks_at_its_images_is_refused() -> None:
    class Branching(Residual):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images if images.mean() > 0 else -images)

    with pytest.raises(ExportError, match="cannot follow this network's forward pass"):
        fine_tune(Branching())


class Residual(nn.Module):
    """A residual sum, and a batch normalisation that follows it and not a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.first(images)
        values = torch.relu(self.norm(self.second(values) + values))
        logits: torch.Tensor = self.head(values.mean((2, 3)))
        return logits


def fine_tune(network: nn.Module) -> tuple[nn.Module, Any]:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    images = Images(pixels, random.integers(0, 4, 24))
    with Progress(disable=True) as progress:
        return qat.fine_tune(network, pixels[:8], images, SPEC, TRAINING, Augmentation(), 0, progress), pixels


def test_a_graph_cannot_be_trained(data: DataSplit, tmp_path: Path, trimrt: Callable[..., Result]) -> None:
    graph = tmp_path / "foreign.onnx"
    network, example = (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 10)).eval(),
        torch.zeros(1, 3, 24, 24),
    )
    torch.onnx.export(network, (example,), graph, dynamo=True, verbose=False)
    result = trimrt("build", graph, "--data", data.source, "--preprocess", "0..1", "--qat", "-o", tmp_path)
    assert result.exit_code == 1
    assert "is a graph, and --qat needs a network that can be trained" in result.output
    assert not list(tmp_path.glob("*openvino"))


def test_a_missing_modelopt_is_named_before_any_work(
    fragile: Path, tmp_path: Path, trimrt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    result = trimrt("build", fragile, "--qat", "--target", "openvino", "-o", tmp_path)
    assert result.exit_code == 1
    assert "--qat needs NVIDIA ModelOpt" in result.output
    assert "pip install 'trimrt[compress]'" in result.output


def test_inspect_tells_of_the_training(built: Built, trimrt: Callable[..., Result]) -> None:
    shown = " ".join(trimrt("inspect", built.package.folder).output.split())
    assert "qat, 64 training images, seed 0; fine-tuned for 6 epochs on 1293" in shown


def test_a_failed_gate_names_the_option_and_the_option_works(
    data: DataSplit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    """With two such channels INT8 loses 10 points, and one epoch wins back most of them."""
    checkpoint = write_outliers(DIGITS_STUDENT, tmp_path / "outliers")
    arguments = (
        *("build", checkpoint, "--target", "openvino", "-o", tmp_path, "--calibration", "max"),
        *("--no-correction", "--no-rounding", "--no-sensitivity"),
        *("--calibration-images", 32, "--max-drop", 6, "--min-agreement", 93),
    )
    result = trimrt(*arguments)
    assert result.exit_code == 1
    assert "--qat fine-tunes the network for INT8" in result.output

    result = trimrt(*arguments, "--qat", "--qat-epochs", 1, "--qat-learning-rate", 0.002)
    assert result.exit_code == 0, result.output
    calibration = read_manifest(tmp_path / "outliers-int8-openvino").provenance.calibration
    assert calibration is not None
    assert calibration.fine_tuning is not None
    assert (calibration.fine_tuning.epochs, calibration.fine_tuning.learning_rate) == (1, 0.002)
