"""What TensorRT-RTX's real builder makes of our graphs, layer by layer; it needs no GPU for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.options import TensorRTOptions
from builder.kit import Kit, open_kit
from builder.prepare.placement import leave_out
from runtime.manifest import BatchSizes, EngineError, LeftOut, Precision
from runtime.tensorrt.layers import LAYERS_NAME, PlanLayer, parse_layers, read_layers, summarise
from trimrt.cli import main
from trimrt.selftest.checks import KIT

CONVOLUTIONS = 20  # of a ResNet18
FIXED = [BatchSizes(min=8, opt=8, max=8)]
RESOURCES = BuildResources(workspace=1 << 30)


def built(rtx, precision: Precision, folder: Path, **options) -> list[PlanLayer]:
    (_, graph) = next(iter(open_kit(KIT).graphs(precision, "fp16")))
    resources = BuildResources(workspace=1 << 30, layers=folder)
    build_engine(rtx, graph, TensorRTOptions(profiles=FIXED, **options), resources)
    return read_layers(folder)


@pytest.fixture(scope="module")
def fp16(rtx, tmp_path_factory: pytest.TempPathFactory) -> list[PlanLayer]:
    return built(rtx, "fp16", tmp_path_factory.mktemp("fp16"))


@pytest.fixture(scope="module")
def int8(rtx, tmp_path_factory: pytest.TempPathFactory) -> list[PlanLayer]:
    return built(rtx, "int8", tmp_path_factory.mktemp("int8"))


def convolutions(layers: list[PlanLayer]) -> list[PlanLayer]:
    return [layer for layer in layers if layer.kind == "correlation"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_comes_before_the_network_is_one_kernel(precision: str, request: pytest.FixtureRequest) -> None:
    """Pixels are cast, normalised and laid out in the kernel that reads them."""
    first, *others = request.getfixturevalue(precision)
    assert [tensor.dtype for tensor in first.inputs] == ["UInt8"]
    assert {"pre/centre", "pre/layout"} <= set(first.graph_layers)
    assert not any(name.startswith("pre/") for layer in others for name in layer.graph_layers)


def test_fp16_convolutions_have_bias_relu_and_sum_inside(fp16: list[PlanLayer]) -> None:
    found = convolutions(fp16)
    assert len(found) == CONVOLUTIONS
    assert {tensor.dtype for layer in found for tensor in layer.outputs} == {"Half"}
    fused = Counter(len(layer.graph_layers) for layer in found)
    assert fused == {1: 3, 2: 9, 3: 8}, "a lone convolution, with ReLU, with sum and ReLU"
    assert len(fp16) <= CONVOLUTIONS + 6, "before, pooling, and the head"


def test_int8_convolutions_of_rtx_write_fp32_with_a_kernel_more_each(int8: list[PlanLayer]) -> None:
    """Why FP16 is the default there. If this fails after an upgrade, INT8 deserves another look."""
    found = convolutions(int8)
    assert len(found) == CONVOLUTIONS
    assert {tensor.dtype for layer in found for tensor in layer.inputs} == {"Int8"}
    assert {tensor.dtype for layer in found for tensor in layer.outputs} == {"Float"}
    assert len(int8) >= 1.8 * CONVOLUTIONS


@pytest.mark.parametrize(
    ("part", "in_int8"), [("residual sums", CONVOLUTIONS), ("first layer", CONVOLUTIONS - 1)]
)
def test_int8_that_leaves_more_in_fp16_is_built(rtx, tmp_path: Path, part: LeftOut, in_int8: int) -> None:
    _, whole = next(iter(open_kit(KIT).graphs("int8", "fp16")))
    graph = leave_out(onnx.load(whole), part)
    assert graph is not None
    onnx.save(graph, tmp_path / "graph.onnx")
    resources = BuildResources(workspace=1 << 30, layers=tmp_path)
    build_engine(rtx, tmp_path / "graph.onnx", TensorRTOptions(profiles=FIXED), resources)
    found = convolutions(read_layers(tmp_path))
    assert len(found) == CONVOLUTIONS
    assert sum(layer.inputs[0].dtype == "Int8" for layer in found) == in_int8


def test_without_details_there_is_no_list(rtx, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"has no layers\.json"):
        built(rtx, "fp16", tmp_path, profiling="layer_names_only")


def test_a_package_has_its_layers_and_inspect_shows_them(
    rtx, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    """Of TensorRT-RTX FP16 is built unless told otherwise."""
    result = trimrt("build", KIT, "--target", "tensorrt-rtx", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    package = tmp_path / "selftest-fp16-tensorrt-rtx"
    assert (package / LAYERS_NAME).is_file()
    shown = trimrt("inspect", package, "--layers")
    assert shown.exit_code == 0, shown.output
    assert summarise(read_layers(package)) in " ".join(shown.output.split())
    assert "correlation" in shown.output


def test_int8_for_rtx_is_built_with_a_word_of_warning(
    rtx, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    result = trimrt("build", KIT, "--target", "tensorrt-rtx", "-p", "int8", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "FP16, which it fuses, is likely faster" in " ".join(result.output.split())


def test_sparsity_is_told_to_have_no_effect_where_no_weights_are_sparse(
    rtx, kit: Kit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    """As in all networks that are made here."""
    for options, told in ((["--sparsity"], True), ([], False)):
        arguments = ["build", kit.path, "--target", "tensorrt-rtx", "-p", "fp16", "-o", tmp_path, *options]
        result = trimrt(*arguments)
        assert result.exit_code == 0, result.output
        said = "0 of 21 layers have 2:4 sparse weights, so --sparsity has no effect" in result.output
        assert said == told


# The list, as the releases write it

LINE = (
    "Name: conv1 + relu, LayerType: CaskConvolution, Inputs: [ { Name: a, Location: Device, "
    "Dimensions: [1,3,8,8], Format/Datatype: Half }], Outputs: [ { Name: b, Location: Device, "
    "Dimensions: [1,16,4,4], Format/Datatype: Half }], ParameterType: Convolution, Kernel: [3,3], "
    "TacticName: sm80_xmma_fprop, StreamId: 0, Metadata: [ONNX Layer: conv1]\x1f[ONNX Layer: relu]"
)

ALONE = LINE.replace("\x1f[ONNX Layer: relu]", "")


def test_a_line_with_more_parts_is_read(rtx) -> None:
    (layer,) = parse_layers(f"Layers:\n{LINE}\n\nBindings:\nimages")
    assert (layer.name, layer.kind, layer.kernel) == ("conv1 + relu", "CaskConvolution", "sm80_xmma_fprop")
    assert layer.graph_layers == ["conv1", "relu"]
    assert [tensor.shape for tensor in layer.outputs] == [[1, 16, 4, 4]]


def test_what_is_no_list_has_no_layers() -> None:
    assert parse_layers("Layers:\nconv1\nconv2\n") == []
    assert parse_layers("") == []


def test_a_list_is_summed_up_by_the_types_written_and_by_fusion() -> None:
    layers = parse_layers(f"Layers:\n{LINE}\n{LINE.replace('Half }], Para', 'Int8 }], Para')}\n{ALONE}")
    assert summarise(layers) == "3 layers: 2 write Half, 1 write Int8; 2 compute several of the graph's"


@pytest.mark.parametrize("content", ["{", "[{}]", "[1]"])
def test_a_damaged_list_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / LAYERS_NAME).write_text(content)
    with pytest.raises(EngineError, match=r"layers\.json is no list of layers"):
        read_layers(tmp_path)


def test_a_package_without_a_list_is_told(tmp_path: Path) -> None:
    from tiny_engine import write_package

    result = CliRunner().invoke(main, ["inspect", str(write_package(tmp_path)), "--layers"])
    assert result.exit_code == 1
    assert "has no layers.json" in result.output
