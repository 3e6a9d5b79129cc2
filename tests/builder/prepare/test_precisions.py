"""What the precisions are: sizes, types, legality and accuracy of the graphs in a kit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from builder.compile.targets.openvino.folding import fold_normalisation
from builder.compile.targets.openvino.saturation import make_safe, sums_saturate
from builder.compile.targets.openvino.target import OpenVINOTarget
from builder.kit import Graph, Kit
from builder.prepare.export import export_onnx, run_onnx
from builder.prepare.int8 import convert_to_int8
from builder.prepare.int8_dynamic import convert_to_dynamic_int8
from builder.prepare.legality import check_legality
from models.datasets import DataSplit
from models.preprocessing import Preprocessing
from runtime.loading import load_engine
from runtime.manifest import BatchSizes, Precision
from runtime.openvino import CONFIGURATION, this_machine

PIXELS_SPEC = Preprocessing(resize=16, height=16, width=16)


def graph_of(kit: Kit, precision: Precision) -> tuple[Graph, Path]:
    return next(kit.graphs(precision, "fp32"))


def layer_weights(path: Path) -> list[int]:
    """ONNX types that the weights of convolutions and linear layers are stored in."""
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    found = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            name = node.input[1]
            while name not in types:  # behind a DequantizeLinear
                name = makers[name].input[0]
            found.append(types[name])
    return found


def test_fp16_halves_the_weights(kit: Kit) -> None:
    full, half = graph_of(kit, "fp32")[0], graph_of(kit, "fp16")[0]
    assert full.weights_bytes / half.weights_bytes >= 1.95


# The smaller the network, the more its per-channel scales weigh: the shipped student reaches 3.9.
@pytest.mark.parametrize(("precision", "factor"), [("int8", 3.85), ("int8-dynamic", 3.5)])
def test_int8_stores_its_weights_as_int8(kit: Kit, precision: Precision, factor: float) -> None:
    graph, path = graph_of(kit, precision)
    types = layer_weights(path)

    assert types.count(TensorProto.INT8) >= len(types) - 1
    assert graph_of(kit, "fp32")[0].weights_bytes / graph.weights_bytes >= factor


def test_fp16_stores_its_weights_as_fp16(kit: Kit) -> None:
    assert set(layer_weights(graph_of(kit, "fp16")[1])) == {TensorProto.FLOAT16}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-dynamic"])
def test_every_graph_takes_pixels_and_gives_float32(kit: Kit, precision: Precision) -> None:
    graph = onnx.load(graph_of(kit, precision)[1]).graph
    assert [tensor.type.tensor_type.elem_type for tensor in graph.input] == [TensorProto.UINT8]
    assert [tensor.type.tensor_type.elem_type for tensor in graph.output] == [TensorProto.FLOAT] * 2


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_int8_graphs_are_legal_on_tensorrt(kit: Kit, precision: Precision) -> None:
    findings = check_legality(onnx.load(graph_of(kit, precision)[1]))
    assert findings.errors == []


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp32", 1e-4), ("fp16", 0.05), ("int8", 1.0), ("int8-dynamic", 0.6)]
)
def test_engine_stays_close_to_the_fp32_network(
    packages: dict[Precision, Path], precision: Precision, limit: float
) -> None:
    evidence = load_engine(packages[precision]).manifest.evidence
    assert evidence is not None
    assert evidence.max_logit_difference <= limit


@pytest.mark.parametrize(("precision", "integer"), [("fp16", 0), ("int8", 20), ("int8-dynamic", 19)])
def test_int8_convolutions_run_as_integer_kernels(kit: Kit, precision: Precision, integer: int) -> None:
    """Dynamic ones too, where OpenVINO runs the usual ConvInteger in floating point."""
    model = openvino.Core().compile_model(graph_of(kit, precision)[1], "CPU", CONFIGURATION)
    kernels = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    types = [
        kernel["runtimePrecision"].astype(str) for kernel in kernels if kernel["layerType"] == "Convolution"
    ]

    assert len(types) == 20
    assert sum(kind in ("i8", "u8") for kind in types) == integer


@pytest.mark.parametrize("framed", [False, True])
def test_no_arithmetic_comes_before_an_int8_engines_first_convolution(kit: Kit, framed: bool) -> None:
    core = openvino.Core()
    plain = core.read_model(graph_of(kit, "int8")[1])
    folded = plain.clone()
    fold_normalisation(core, folded, framed=framed)

    def before(model: openvino.Model) -> set[str]:
        nodes = core.compile_model(model, "CPU", CONFIGURATION).get_runtime_model().get_ordered_ops()
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
        return set(kinds[: kinds.index("Convolution")])

    arithmetic = {"Subtract", "Multiply", "MulAdd", "Eltwise", "Subgraph", "FakeQuantize", "Convert"}
    assert before(plain) & arithmetic, "there was something to fold"
    assert not before(folded) & arithmetic


@pytest.mark.parametrize("framed", [False, True])
def test_folding_the_normalisation_changes_rounding_only(kit: Kit, data: DataSplit, framed: bool) -> None:
    core = openvino.Core()
    path = graph_of(kit, "int8")[1]
    images = data.validation.load_pixels(kit.student.preprocessing)
    images = np.concatenate([images, 255 - images, np.zeros_like(images[:1]), np.full_like(images[:1], 255)])
    unfolded, folded = core.read_model(path), core.read_model(path)
    fold_normalisation(core, folded, framed=framed)
    if sums_saturate():
        make_safe(core, unfolded)
        make_safe(core, folded)

    exact = run_onnx(graph_of(kit, "fp32")[1], images)

    errors = [
        np.abs(core.compile_model(model, "CPU", CONFIGURATION)(images)[0] - exact).mean()
        for model in (folded, unfolded)
    ]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("padding", [[0, 0, 0, 0], [3, 3, 3, 3], [2, 1, 0, 3]])
def test_the_frame_is_the_padding_that_the_network_was_trained_with(
    tmp_path: Path, padding: list[int]
) -> None:
    """Not only near the mean of the channels: these differ by much, and the images are their means."""
    spec = PIXELS_SPEC.model_copy(update={"mean": (0.1, 0.5, 0.9), "std": (1.0, 0.5, 0.25)})
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 7, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    master, path = tmp_path / "master.onnx", tmp_path / "int8.onnx"
    export_onnx(network, spec, master)
    mean = np.array([0.1, 0.5, 0.9]) * 255
    noise = np.random.default_rng(0).integers(-25, 26, (16, spec.height, spec.width, 3))
    pixels = np.clip(np.round(mean) + noise, 0, 255).astype(np.uint8)
    convert_to_int8(master, path, pixels, method="max", rest="fp32")
    graph = onnx.load(path)
    (convolution,) = (node for node in graph.graph.node if node.op_type == "Conv")
    (pads,) = (attribute for attribute in convolution.attribute if attribute.name == "pads")
    pads.ints[:] = padding
    onnx.save(graph, path)

    core = openvino.Core()
    plain, framed = core.read_model(path), core.read_model(path)
    fold_normalisation(core, plain)
    fold_normalisation(core, framed, framed=True)
    found, expected = (
        core.compile_model(model, "CPU", CONFIGURATION)(pixels)[0] for model in (framed, plain)
    )
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.skipif("amx_int8" not in this_machine().cpu_features, reason="needs a processor with AMX")
def test_the_first_convolution_too_is_computed_by_amx(kit: Kit, tmp_path: Path) -> None:
    artefact = OpenVINOTarget().compile(
        graph_of(kit, "int8")[1], tmp_path, BatchSizes(min=1, opt=4, max=4), lambda _step: None
    )
    blob = openvino.Tensor(np.fromfile(tmp_path / artefact.file, np.uint8))
    nodes = openvino.Core().import_model(blob, "CPU", CONFIGURATION).get_runtime_model().get_ordered_ops()
    kernels = [node.get_rt_info() for node in nodes]
    first = next(kernel for kernel in kernels if kernel["layerType"].astype(str) == "Convolution")
    assert "amx" in first["primitiveType"].astype(str)


@pytest.fixture(scope="module")
def pruned_stem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A master graph whose first convolution has 19 output channels, which TensorRT cannot do in INT8."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 19, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    path = tmp_path_factory.mktemp("stem") / "master.onnx"
    export_onnx(network, PIXELS_SPEC, path)
    return path


@pytest.mark.parametrize(
    ("rest", "excluded", "quantised"), [("fp32", False, True), ("fp32", True, False), ("fp16", False, False)]
)
def test_a_first_convolution_that_only_cpus_can_do_in_int8(
    pruned_stem: Path, tmp_path: Path, rest: Literal["fp32", "fp16"], excluded: bool, quantised: bool
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    (first,) = (node.name for node in onnx.load(pruned_stem).graph.node if node.op_type == "Conv")
    path = tmp_path / "int8.onnx"
    exclude = [first] if excluded else []
    convert_to_int8(pruned_stem, path, pixels, method="max", rest=rest, exclude=exclude)

    graph = onnx.load(path).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    (layer,) = (node for node in graph.node if node.op_type == "Conv")
    assert (makers[layer.input[0]] == "DequantizeLinear") == quantised
    assert (makers.get(layer.input[1]) == "DequantizeLinear") == quantised
    exact = run_onnx(pruned_stem, pixels)
    np.testing.assert_allclose(run_onnx(path, pixels), exact, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-dynamic"])
def test_other_precisions_are_not_folded(kit: Kit, precision: Precision) -> None:
    core = openvino.Core()
    model = core.read_model(graph_of(kit, precision)[1])
    before = [op.get_friendly_name() for op in model.get_ordered_ops()]
    fold_normalisation(core, model)
    assert [op.get_friendly_name() for op in model.get_ordered_ops()] == before


def test_dynamic_int8_result_does_not_depend_on_the_batch(kit: Kit, data: DataSplit) -> None:
    """Ranges found over a whole batch would let a bright image coarsen its neighbours."""
    path = graph_of(kit, "int8-dynamic")[1]
    images = data.validation.load_pixels(kit.student.preprocessing)[:8].copy()
    images[1:] = 255 - images[1:]

    together, alone = run_onnx(path, images), run_onnx(path, images[:1])

    np.testing.assert_array_equal(together[:1], alone)


def test_dynamic_int8_of_an_image_without_contrast_is_finite(kit: Kit) -> None:
    path = graph_of(kit, "int8-dynamic")[1]
    assert np.isfinite(run_onnx(path, np.zeros((1, 24, 24, 3), np.uint8))).all()


def test_dynamic_int8_of_layers_that_share_weights_and_bias(tmp_path: Path) -> None:
    """Grouped, biased and weight-sharing convolutions, and a linear layer of another form, which stays."""
    rng = np.random.default_rng(0)
    constants = {
        "weights": rng.normal(size=(4, 2, 3, 3)),
        "bias": rng.normal(size=4),
        "pool_axes": np.array([2, 3]),
        "linear": rng.normal(size=(4, 3)),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "pre/cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], "pre/layout", perm=[0, 3, 1, 2]),
        helper.make_node("Relu", ["nchw"], ["x"]),
        helper.make_node("Conv", ["x", "weights", "bias"], ["y"], group=2, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["y", "weights", "bias"], ["z"], group=2, pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["z", "pool_axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "linear"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "shared",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 6, 6, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(value.astype(np.int64 if name == "pool_axes" else np.float32), name)
            for name, value in constants.items()
        ],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "master.onnx")

    convert_to_dynamic_int8(tmp_path / "master.onnx", tmp_path / "dynamic.onnx")

    pixels = rng.integers(0, 256, (5, 6, 6, 4), np.uint8)
    expected, got = (run_onnx(tmp_path / name, pixels) for name in ("master.onnx", "dynamic.onnx"))
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())
    assert layer_weights(tmp_path / "dynamic.onnx") == [TensorProto.INT8, TensorProto.INT8, TensorProto.FLOAT]
