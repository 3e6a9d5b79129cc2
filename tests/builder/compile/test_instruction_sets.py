"""INT8 engines are right at each instruction set that this machine has: they are held against exact sums.

Exact is ONNX Runtime without optimisations: it runs the Q/DQ graph as it is written, in floating point. An
engine may differ from it by rounding only: a value on the edge between two steps may take either.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from small_student import SPEC
from torch import nn

from builder.kit import INPUT, LOGITS, Kit
from builder.prepare.export import export_onnx
from builder.prepare.int8 import convert_to_int8
from builder.prepare.int8_dynamic import convert_to_dynamic_int8
from builder.prepare.preparation import open_checkpoint
from models.datasets import DataSplit
from models.preprocessing import Pixels
from models.pretrained import DIGITS_STUDENT
from runtime.loading import load_engine
from runtime.manifest import MANIFEST_NAME, EngineError, Precision, read_manifest
from runtime.processor import WIDE_SUMS
from trimrt.inspect import inspect

SCRIPT: Final = Path(__file__).parents[2] / "support" / "engine_at_level.py"

# Each level with the instruction set that it is named for, without which the machine has no such level.
LEVELS: Final = {
    "SSE41": "sse4_1",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx_vnni",
    "AVX512_CORE": "avx512bw",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_fp16",
    "DEFAULT": "sse4_1",
}
# What most processors without VNNI have, and the machine as it is; the long tests run them all.
COMMON: Final = ("AVX2", "DEFAULT")
FLAGS: Final = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()

pytestmark = pytest.mark.skipif("sse4_1" not in FLAGS, reason="the instruction sets are those of x86")


class Residual(nn.Module):
    """A sum of what came in and what the layers make of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Attention(nn.Module):
    """Products of two activations. Without normalisation, which OpenVINO cannot run at SSE 4.1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        weights = torch.softmax(self.queries(x) @ self.keys(x).transpose(1, 2) / 4, 2)
        return (weights @ self.values(x)).mean(1)


def classifier(*layers: nn.Module) -> nn.Module:
    """Pooling comes first, so that the normalisation is not folded into the first convolution."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(3, 32, 3, 1, 1),
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def conv(size: int = 3, **options: int) -> nn.Module:
    return nn.Conv2d(32, 32, size, padding=size // 2, **options)


NETWORKS: Final[dict[str, Callable[[], nn.Module]]] = {
    "rectified": lambda: classifier(nn.ReLU(), conv(), nn.ReLU()),
    "signed": lambda: classifier(conv(), conv(1)),
    "leaky": lambda: classifier(nn.LeakyReLU(0.3), conv(), nn.SiLU(), conv(1), nn.Hardswish()),
    "residual": lambda: classifier(
        nn.ReLU(), Residual(conv(), nn.ReLU(), conv()), nn.ReLU(), Residual(conv(1))
    ),
    "linear-bottleneck": lambda: classifier(*(Residual(conv(1), nn.ReLU6(), conv(1)) for _ in range(2))),
    "grouped": lambda: classifier(nn.ReLU(), conv(groups=4), nn.ReLU(), conv(groups=2)),
    "depthwise": lambda: classifier(nn.ReLU6(), conv(groups=32), conv(1), conv(5, groups=32), conv(1)),
    "dilated": lambda: classifier(nn.ReLU(), nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.ReLU()),
    "transposed": lambda: classifier(nn.ReLU(), nn.ConvTranspose2d(32, 32, 2, 2), nn.ReLU(), conv()),
    "perceptron": lambda: nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(108, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10)
    ),
    "attention": lambda: nn.Sequential(
        nn.AvgPool2d(4), nn.Conv2d(3, 32, 1), Attention(32), nn.Linear(32, 10)
    ),
}


# Also quantised by calibration, which takes longer; only so are products of two activations quantised.
STATIC: Final = ("leaky", "linear-bottleneck", "depthwise", "attention")


@dataclass(frozen=True, eq=False)
class Graphs:
    """Graphs in a folder, and what each gives for the same pixels.

    Attributes:
        folder: with a file `NAME.onnx` for each.
        pixels: uint8 NHWC.
        reference: logits of the FP32 network, by the graphs' names.
    """

    folder: Path
    pixels: Pixels
    reference: Mapping[str, NDArray[np.float32]]

    def exact(self, name: str, found: Found | None = None) -> NDArray[np.float32]:
        """Logits of the quantised graph; of one that was `found`, with the weights that the target made."""
        model = onnx.load(str(self.folder / f"{name}.onnx"))
        changed = found is not None and found.saturation_safe
        return exact(with_weights(model, found.weights) if changed else model, self.pixels)


@dataclass(frozen=True)
class Found:
    """What a child process made of one graph."""

    logits: Mapping[str, NDArray[np.float32]]
    weights: Mapping[str, NDArray[np.float64]]
    saturation_safe: bool
    features: list[str]
    integer_layers: int


def exact(model: onnx.ModelProto, pixels: Pixels) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    parts = [
        session.run([LOGITS], {INPUT: part})[0] for part in np.array_split(pixels, -(-len(pixels) // 32))
    ]
    return np.concatenate(parts)


def with_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[np.float64]]) -> onnx.ModelProto:
    """The graph with these values instead of integers that are dequantised, and second operands of 7 bits."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    makers = {name: node for node in result.graph.node for name in node.output}
    for node in list(result.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            values = weights[node.input[0]].astype(np.float32)
            result.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            result.graph.node.remove(node)
        elif node.op_type == "MatMul" and (scale := activation_scale(node.input[1], makers, constants)):
            requantise_second_operand(result.graph, node, scale)
    return result


def requantise_second_operand(graph: onnx.GraphProto, product: onnx.NodeProto, scale: float) -> None:
    """Round it to 7 bits: in steps of twice its scale."""
    names = [f"{product.name}/{part}" for part in ("scale", "zero", "int", "rounded")]
    graph.initializer.append(numpy_helper.from_array(np.array(2 * scale, np.float32), names[0]))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), names[1]))
    place = list(graph.node).index(product)
    graph.node.insert(place, helper.make_node("DequantizeLinear", [names[2], *names[:2]], [names[3]]))
    graph.node.insert(place, helper.make_node("QuantizeLinear", [product.input[1], *names[:2]], [names[2]]))
    product.input[1] = names[3]


def activation_scale(
    name: str, makers: Mapping[str, onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> float | None:
    """The scale of a quantised activation; None if that is a weight, or is not quantised."""
    node = makers.get(name)
    while node is not None and node.op_type == "Transpose":
        node = makers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] in constants:
        return None
    return float(numpy_helper.to_array(constants[node.input[1]]))


def run(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: a process that has loaded OpenVINO keeps its instruction set."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def run_at(level: str, graphs: Graphs, folder: Path) -> dict[str, Found]:
    """Compile and run all of them, in a process of that level."""
    output = folder / level
    output.mkdir()
    np.save(folder / "pixels.npy", graphs.pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", level)
        done = run([SCRIPT, graphs.folder, folder / "pixels.npy", output])
    assert done.returncode == 0, done.stderr
    said = json.loads((output / "said.json").read_text())
    arrays = {path.stem: dict(np.load(path)) for path in output.glob("*.npz")}
    return {name: Found(arrays[name], arrays[f"{name}-weights"], **of) for name, of in said.items()}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(level, marks=[] if level in COMMON else [pytest.mark.slow])
        for level, flag in LEVELS.items()
        if flag in FLAGS
    ],
)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Networks of every kind of layer, with weights that use all of their range; some images are white."""
    folder = tmp_path_factory.mktemp("neighbours")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, SPEC.height, SPEC.width, 3), np.uint8)
    pixels = np.concatenate([noise, np.full_like(noise[:4], 255), np.zeros_like(noise[:4])])
    reference = {}
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        network = build().eval()
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.uniform_(parameter, -1, 1)
                parameter.data *= (3 / parameter[0].numel()) ** 0.5
        master = folder / "master"
        export_onnx(network, SPEC, master)
        convert_to_dynamic_int8(master, folder / f"{name}-dynamic.onnx")
        kinds = ["dynamic"]
        if name in STATIC:
            convert_to_int8(master, folder / f"{name}-static.onnx", pixels, method="max", rest="fp32")
            kinds.append("static")
        reference |= dict.fromkeys(
            (f"{name}-{kind}" for kind in kinds), exact(onnx.load(str(master)), pixels)
        )
    return Graphs(folder, pixels, reference)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: DataSplit, depthwise: Path) -> Graphs:
    """The student that ships, and a network of depthwise convolutions, beside all test images."""
    folder = tmp_path_factory.mktemp("trained")
    pixels = data.test.load_pixels(SPEC)
    calibration = data.train.load_pixels(SPEC)[:128]
    masters = {"student": tmp_path_factory.mktemp("work") / "student", "depthwise": depthwise}
    open_checkpoint(DIGITS_STUDENT, None).export(masters["student"])
    reference = {}
    for name, master in masters.items():
        convert_to_int8(master, folder / f"{name}-static.onnx", calibration, method="entropy", rest="fp32")
        convert_to_dynamic_int8(master, folder / f"{name}-dynamic.onnx")
        shutil.copyfile(master, folder / f"{name}-fp32.onnx")
        kinds = (f"{name}-{kind}" for kind in ("static", "dynamic", "fp32"))
        reference |= dict.fromkeys(kinds, exact(onnx.load(str(master)), pixels))
    return Graphs(folder, pixels, reference)


@pytest.fixture(scope="module")
def found_neighbours(
    level: str, neighbours: Graphs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    return run_at(level, neighbours, tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="module")
def found_trained(level: str, trained: Graphs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run_at(level, trained, tmp_path_factory.mktemp("found"))


def test_weights_are_rounded_where_sums_have_16_bits(level: str, found_trained: dict[str, Found]) -> None:
    """Of what the kernels really do, not of what the processor is called."""
    for name, found in found_trained.items():
        if name.endswith("fp32"):
            continue
        assert found.saturation_safe == (not WIDE_SUMS.intersection(found.features))
        if level in ("SSE41", "AVX2", "AVX512_CORE"):
            assert found.saturation_safe
        if level.endswith(("VNNI", "BF16", "FP16")):
            assert not found.saturation_safe


def test_every_kind_of_layer_computes_exact_sums(
    neighbours: Graphs, found_neighbours: dict[str, Found]
) -> None:
    """In batches of every size, but for rounding: a step of an activation is 1/127 of its range."""
    for name, found in found_neighbours.items():
        expected = neighbours.exact(name, found)
        for size, logits in found.logits.items():
            difference = np.abs(logits - expected).mean() / expected.std()
            assert difference <= 0.005, f"{name}, {size}"


def test_layers_run_in_int8(found_neighbours: dict[str, Found]) -> None:
    """Or exactness would show nothing of the integer kernels."""
    layers = {name: found.integer_layers for name, found in found_neighbours.items()}
    assert all(layers.values()), layers


def test_the_student_that_ships_keeps_its_labels_and_logits(
    trained: Graphs, found_trained: dict[str, Found]
) -> None:
    for name in ("student-static", "student-dynamic"):
        for logits in found_trained[name].logits.values():
            assert np.abs(logits - trained.reference[name]).mean() <= 0.1, name
            assert np.mean(logits.argmax(1) == trained.reference[name].argmax(1)) >= 0.997, name


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("network", ["student", "depthwise"])
def test_trained_networks_lose_only_what_rounding_to_int8_costs(
    trained: Graphs, found_trained: dict[str, Found], network: str, kind: str
) -> None:
    """Exact sums of the same weights are as far from FP32; those of 8-bit weights at least half as far."""
    name = f"{network}-{kind}"
    found, reference = found_trained[name], trained.reference[name]
    exact, of_8_bits = trained.exact(name, found), trained.exact(name)
    for logits in found.logits.values():
        assert np.abs(logits - reference).mean() <= 1.1 * np.abs(exact - reference).mean()
        assert np.abs(logits - reference).mean() <= 2.2 * np.abs(of_8_bits - reference).mean()
        if kind == "dynamic":  # whose first convolution is not folded
            assert np.abs(logits - exact).mean() <= 0.005


def test_fp32_is_computed_in_fp32(trained: Graphs, found_trained: dict[str, Found]) -> None:
    """Also where the processor has BF16 or AMX, and OpenVINO would use them."""
    for name in ("student-fp32", "depthwise-fp32"):
        for logits in found_trained[name].logits.values():
            np.testing.assert_allclose(logits, trained.reference[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_a_package_whose_sums_would_overflow_is_refused(
    packages: dict[Precision, Path], precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it says of the processor that it was built on: older packages may say AVX2 only."""
    folder = Path(shutil.copytree(packages[precision], tmp_path / "engine"))
    manifest = read_manifest(folder)
    machine = manifest.compatibility.model_copy(update={"cpu_features": []})
    for safe in (False, None):
        changed = manifest.model_copy(update={"saturation_safe": safe, "compatibility": machine})
        (folder / MANIFEST_NAME).write_text(changed.model_dump_json(), "utf-8")
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        with pytest.raises(
            EngineError, match=r"INT8 weights whose sums overflow.*no VNNI.*Rebuild it here: trimrt build"
        ):
            load_engine(folder)


def test_a_package_built_without_vnni_says_so_and_is_right_or_refused(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO ties its blobs to the instruction set that they were compiled under."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    command = ["build", str(kit.path), "--target", "openvino", "-p", "int8", "-o", str(tmp_path)]
    done = run(["-m", "trimrt", *command])
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny-digits-int8-openvino"
    manifest = read_manifest(folder)
    assert manifest.saturation_safe
    assert manifest.compatibility.cpu_features == []
    assert re.search(
        r"INT8 weights\W+rounded for sums in 16 bits", CliRunner().invoke(inspect, [str(folder)]).output
    )
    assert manifest.evidence is not None
    assert manifest.evidence.label_agreement >= 0.98

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    done = run(["-c", f"from runtime import load_engine; load_engine({str(folder)!r})"])
    assert re.search(r"built for Intel SSE4\.1; OpenVINO uses Intel .* here\. Rebuild it here", done.stderr)
