"""Graphs with fewer channels, made without the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from narrow_graphs import Layers, pixels, residual
from onnx import numpy_helper
from small_kit import CLASSES, SIZE

from builder.compile.narrowing.channels import NarrowableGraph
from builder.compile.narrowing.graph_file import GraphFile
from builder.kit import LOGITS, Kit
from builder.prepare.export import run_onnx

PIXELS = SIZE * SIZE


def narrowed(model: onnx.ModelProto, **widths: int) -> onnx.ModelProto:
    """Checked, with the shapes of all tensors."""
    graph = NarrowableGraph(model.SerializeToString())
    result = onnx.load_from_string(graph.narrowed(widths))
    onnx.checker.check_model(result, full_check=True)
    return result


def shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {constant.name: list(constant.dims) for constant in model.graph.initializer}


def groups(model: onnx.ModelProto) -> dict[str, int]:
    return {group.name: group.channels for group in NarrowableGraph(model.SerializeToString()).groups}


@pytest.mark.slow
def test_every_graph_of_a_kit_has_the_same_groups_and_runs_with_half_of_the_channels(kit: Kit) -> None:
    images = kit.verification.pixels[:2]
    found = []
    for graph in kit.manifest.graphs:
        narrowable = NarrowableGraph((kit.path / graph.file).read_bytes())
        if graph.precision == "int8-dynamic":  # its integer operators are not followed
            assert narrowable.groups == []
            continue
        found.append((narrowable.groups, narrowable.pairs))
        half = {group.name: group.channels // 2 for group in narrowable.groups}
        model = onnx.load_from_string(narrowable.narrowed(half))
        onnx.checker.check_model(model, full_check=True)
        assert run_onnx(model, images).shape == (2, len(kit.student.labels))
    assert all(each == found[0] for each in found)
    names = [group.name for group in found[0][0]]
    assert len(names) == 12  # four residual streams, and the inside of eight blocks
    assert {"conv1", "layer1.0.conv1", "layer2.0.conv2", "layer4.1.conv1"} <= set(names)


@pytest.mark.slow
def test_the_constants_of_a_kit_are_read_as_onnx_reads_them(kit: Kit) -> None:
    for graph in kit.manifest.graphs:
        data = (kit.path / graph.file).read_bytes()
        constants = GraphFile(data).constants
        for tensor in onnx.load_from_string(data).graph.initializer:
            expected = numpy_helper.to_array(tensor)
            assert constants[tensor.name].dtype == expected.dtype
            np.testing.assert_array_equal(constants[tensor.name], expected)


@pytest.mark.slow
def test_a_graph_that_loses_no_channels_computes_what_it_did(kit: Kit) -> None:
    graph = next(graph for graph in kit.manifest.graphs if graph.precision == "fp32")
    data = (kit.path / graph.file).read_bytes()
    images = kit.verification.pixels[:4]
    same = run_onnx(onnx.load_from_string(NarrowableGraph(data).narrowed({})), images)
    np.testing.assert_array_equal(same, run_onnx(onnx.load_from_string(data), images))


def test_channels_without_any_weight_can_go_and_nothing_changes() -> None:
    model = residual(width=8, inner=8)
    for constant in model.graph.initializer:
        if constant.name == "network/branch.weight":
            weights = numpy_helper.to_array(constant).copy()
            weights[:, 4:] = 0
            constant.CopyFrom(numpy_helper.from_array(weights, constant.name))
    np.testing.assert_allclose(
        run_onnx(narrowed(model, inner=4), pixels()), run_onnx(model, pixels()), rtol=1e-5
    )


def test_what_a_sum_joins_narrows_together() -> None:
    model = residual(width=32, inner=48)
    assert groups(model) == {"branch": 32, "inner": 48}
    assert NarrowableGraph(model.SerializeToString()).pairs == [("branch", "inner")]
    assert shapes(narrowed(model, branch=8, inner=16)) == {
        "network/stem.weight": [8, 3, 3, 3],
        "network/stem.bias": [8],
        "network/inner.weight": [16, 8, 3, 3],
        "network/inner.bias": [16],
        "network/branch.weight": [8, 16, 3, 3],
        "network/branch.bias": [8],
        "shape": [2],
        "network/fc.weight": [CLASSES, 8],
        "network/fc.bias": [CLASSES],
    }


def test_a_depthwise_convolution_narrows_with_what_it_reads() -> None:
    layers = Layers()
    wide = layers.convolution("wide", "x", 3, 32)
    deep = layers.convolution("deep", wide, 32, 32, groups=32)
    model = layers.model(deep, 32)
    assert groups(model) == {"wide": 32}
    smaller = narrowed(model, wide=8)
    assert shapes(smaller)["network/deep.weight"] == [8, 1, 3, 3]
    assert run_onnx(smaller, pixels()).shape == (2, CLASSES)


def test_joined_tensors_lose_channels_each_in_its_place() -> None:
    layers = Layers()
    one, two = (layers.convolution(name, "x", 3, 8) for name in ("one", "two"))
    layers.node("Concat", [one, two], "both", axis=1)
    model = layers.model("both", 16)
    assert groups(model) == {"one": 8, "two": 8}
    before, after = (
        {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
        for graph in (model, narrowed(model, one=2, two=4))
    )
    np.testing.assert_array_equal(
        after["network/fc.weight"], before["network/fc.weight"][:, [0, 1, 8, 9, 10, 11]]
    )
    assert list(after["shape"]) == [-1, 6]


def test_weights_of_flattened_maps_lose_all_pixels_of_a_channel() -> None:
    layers = Layers()
    maps = layers.convolution("maps", "x", 3, 4)
    layers.node("Flatten", [maps], "values")
    weights = np.arange(4 * PIXELS * CLASSES).reshape(4 * PIXELS, CLASSES)
    layers.node("MatMul", ["values", layers.constant("network/hidden.weight", weights)], "products")
    layers.node("Unsqueeze", ["products", layers.constant("axes", np.array([2, 3]), np.int64)], "last")
    model = layers.model("last", CLASSES)
    kept = numpy_helper.to_array(
        next(
            each for each in narrowed(model, maps=2).graph.initializer if each.name == "network/hidden.weight"
        )
    )
    np.testing.assert_array_equal(kept, weights[: 2 * PIXELS])


@pytest.mark.parametrize("unknown", ["Split", "grouped", "output"])
def test_channels_that_are_treated_in_an_unknown_way_all_stay(unknown: str) -> None:
    layers = Layers()
    first = layers.convolution("first", "x", 3, 8)
    if unknown == "Split":
        layers.nodes.append(onnx.helper.make_node("Split", [first], ["left", "right"], axis=1, num_outputs=2))
        model = layers.model(layers.convolution("last", "left", 4, 8), 8)
        assert groups(model) == {"last": 8}
    elif unknown == "grouped":
        model = layers.model(layers.convolution("last", first, 8, 8, groups=2), 8)
        assert groups(model) == {}
    else:
        model = layers.model(first, 8)
        (logits,) = (each for each in model.graph.output if each.name == LOGITS)
        logits.name = "first"
        logits.type.tensor_type.ClearField("shape")
        assert groups(model) == {}


def test_a_file_that_is_no_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="no graph"):
        NarrowableGraph(b"")
