"""Tensors are moved about zero before they are quantised, and the network computes what it did.

The network is of depthwise convolutions, ReLU6 and sums, as efficient networks are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_student import SPEC

from builder.kit import INPUT, LOGITS
from builder.prepare.centre import centre
from builder.prepare.int8 import convert_to_int8
from builder.prepare.legality import require_legal
from builder.prepare.placement import keep_in_float
from builder.prepare.qdq import (
    activation_scales,
    attribute,
    constants_of,
    exact_logits,
    quantise_again,
    quantised_layers,
    watch,
)
from builder.prepare.ranges import least_error_scales
from builder.weights import LEVELS
from models.datasets import DataSplit
from models.preprocessing import Pixels


@pytest.fixture(scope="module")
def pixels(data: DataSplit) -> Pixels:
    return data.train.load_pixels(SPEC)[:64]


@pytest.fixture(scope="module")
def master(depthwise: Path) -> onnx.ModelProto:
    return onnx.load(str(depthwise))


@pytest.fixture(scope="module")
def centred(master: onnx.ModelProto, pixels: Pixels) -> onnx.ModelProto:
    found = centre(master, pixels)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def placed(depthwise: Path, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("placed") / "int8.onnx"
    convert_to_int8(depthwise, path, pixels, method="max", rest="fp32")
    return onnx.load(str(path))


def _quantised(placed: onnx.ModelProto, master: onnx.ModelProto, pixels: Pixels) -> onnx.ModelProto:
    images = {node.output[0] for node in master.graph.node if node.name == "pre/layout"}
    tensors = [tensor for tensor in activation_scales(placed) if tensor not in images]
    return quantise_again(placed, master, least_error_scales(master, tensors, pixels))


def _inputs(model: onnx.ModelProto, pixels: Pixels, *, padded: bool) -> dict[str, np.ndarray]:
    """What convolutions behind the first one read, by their names."""
    nodes = [node for node in model.graph.node if node.op_type == "Conv"][1:]
    chosen = {node.name: node.input[0] for node in nodes if any(attribute(node, "pads", ())) == padded}
    parts = list(watch(model, chosen.values(), pixels))
    return {name: np.concatenate([part[tensor] for part in parts]) for name, tensor in chosen.items()}


def test_nothing_changes_in_floating_point(
    master: onnx.ModelProto, centred: onnx.ModelProto, pixels: Pixels
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    for images in (pixels, noise):
        expected = exact_logits(master, images)
        np.testing.assert_allclose(
            exact_logits(centred, images), expected, atol=1e-4 * np.abs(expected).max()
        )


def test_what_lay_above_zero_lies_on_either_side(centred: onnx.ModelProto, pixels: Pixels) -> None:
    for values in _inputs(centred, pixels, padded=False).values():
        assert 0.3 < -values.min() / values.max() < 3


def test_channels_along_sums_are_about_their_own_means(
    master: onnx.ModelProto, centred: onnx.ModelProto, pixels: Pixels
) -> None:
    sums = [node.output[0] for node in master.graph.node if node.op_type == "Add"]
    before, after = (
        [
            np.abs(np.concatenate([part[name] for part in parts]).mean((0, 2, 3))).max()
            for parts in (list(watch(model, sums, pixels)),)
            for name in sums
        ]
        for model in (master, centred)
    )
    assert min(before) > 0.05
    assert max(after) < 1e-3


def test_a_convolution_that_pads_with_zeros_reads_what_it_did(
    master: onnx.ModelProto, centred: onnx.ModelProto, pixels: Pixels
) -> None:
    before, after = (_inputs(model, pixels, padded=True) for model in (master, centred))
    assert before
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, atol=1e-4 * np.abs(values).max())


def test_an_activation_uses_the_steps_on_both_sides_once_it_is_quantised(
    placed: onnx.ModelProto, master: onnx.ModelProto, centred: onnx.ModelProto, pixels: Pixels
) -> None:
    """ReLU6 leaves one half of them without use; zero stays one of them."""

    def steps(model: onnx.ModelProto) -> list[np.ndarray]:
        quantised = _quantised(placed, model, pixels)
        constants = constants_of(quantised)
        layers = quantised_layers(quantised)
        chosen = {
            name: layers[name]
            for name, values in _inputs(master, pixels, padded=False).items()
            if values.min() == 0 and name in layers
        }
        assert chosen
        (values, *_) = watch(quantised, [layer.activation for layer in chosen.values()], pixels)
        return [values[each.activation] / constants[each.activation_scale] for each in chosen.values()]

    for before, after in zip(steps(master), steps(centred), strict=True):
        assert before.min() == 0
        assert after.min() == pytest.approx(-LEVELS, abs=0.5)
        assert after.max() > LEVELS / 2


def test_the_logits_are_nearer_to_those_of_floating_point(
    placed: onnx.ModelProto,
    master: onnx.ModelProto,
    centred: onnx.ModelProto,
    pixels: Pixels,
    data: DataSplit,
) -> None:
    """Where what pads is not quantised, which centring does nothing for."""
    held_out = data.validation.load_pixels(SPEC)
    reference = exact_logits(master, held_out)
    pads = [node.name for node in master.graph.node if any(attribute(node, "pads", ()))]

    def error(model: onnx.ModelProto) -> float:
        graph = keep_in_float(_quantised(placed, model, pixels), model, pads)
        return float(np.square(exact_logits(graph, held_out) - reference).mean())

    assert error(centred) < 0.7 * error(master)


def test_the_graph_is_one_that_all_targets_take(
    placed: onnx.ModelProto, centred: onnx.ModelProto, pixels: Pixels
) -> None:
    require_legal(_quantised(placed, centred, pixels))


def _small(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """Pixels, a convolution named `first` of 3 to 4 channels, and nodes of which the last gives logits."""
    rng = np.random.default_rng(0)
    values = {"w": rng.normal(size=(4, 3, 1, 1)), "b": rng.normal(size=4), **constants}
    first = [
        helper.make_node("Cast", [INPUT], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["pixels"], name="pre/layout", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["pixels", "w", "b"], ["first"], name="first"),
    ]
    graph = helper.make_graph(
        [*first, *nodes],
        "small",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["n", 8, 8, 3])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _last(*inputs: str, name: str = "last", **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", [*inputs], [LOGITS], name=name, **attributes)


RNG = np.random.default_rng(1)
POINTWISE = RNG.normal(size=(2, 4, 1, 1))


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        pytest.param([_last("first", "v")], {"v": POINTWISE}, id="a convolution without activation or bias"),
        pytest.param(
            [helper.make_node("Relu", ["first"], ["on"], name="relu"), _last("on", "v", "c")],
            {"v": POINTWISE, "c": RNG.normal(size=2)},
            id="Relu, which gets a lower bound",
        ),
        pytest.param(
            [helper.make_node("Clip", ["first", "low", "high"], ["on"], name="clip"), _last("on", "v")],
            {"v": POINTWISE, "low": np.array(0), "high": np.array(100)},
            id="Clip",
        ),
        pytest.param(
            [helper.make_node("Relu", ["first"], ["on"], name="relu"), _last("on", "v", group=2)],
            {"v": RNG.normal(size=(4, 2, 1, 1))},
            id="groups",
        ),
        pytest.param(
            [
                helper.make_node("Relu", ["first"], ["on"], name="relu"),
                helper.make_node("GlobalAveragePool", ["on"], ["pooled"], name="pool"),
                helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
                helper.make_node("Gemm", ["flat", "v", "c"], [LOGITS], name="last"),
            ],
            {"v": RNG.normal(size=(4, 2)), "c": RNG.normal(size=2)},
            id="pooling and a linear layer whose weights are not transposed",
        ),
        pytest.param(
            [
                helper.make_node("Relu", ["first"], ["on"], name="relu"),
                helper.make_node("Conv", ["on", "u"], ["branch"], name="branch"),
                helper.make_node("Add", ["on", "branch"], ["sum"], name="sum"),
                _last("sum", "v"),
            ],
            {"u": RNG.normal(size=(4, 4, 1, 1)), "v": POINTWISE},
            id="a sum of both kinds",
        ),
    ],
)
def test_kinds_of_layers_that_give_the_constant_back(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]
) -> None:
    model = _small(*nodes, **constants)
    images = np.random.default_rng(2).integers(0, 256, (8, 8, 8, 3), np.uint8)
    found = centre(model, images)
    assert found is not None
    expected = exact_logits(model, images)
    np.testing.assert_allclose(exact_logits(found, images), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        pytest.param(
            [_last("first", "v", pads=[1, 1, 1, 1])],
            {"v": RNG.normal(size=(2, 4, 3, 3))},
            id="zeros at the border",
        ),
        pytest.param(
            [helper.make_node("Sigmoid", ["first"], ["on"], name="on"), _last("on", "v")],
            {"v": POINTWISE},
            id="an activation that a constant cannot pass",
        ),
        pytest.param(
            [
                helper.make_node("Relu", ["first"], ["on"], name="on"),
                helper.make_node("Sigmoid", ["first"], ["gate"], name="gate"),
                helper.make_node("Mul", ["on", "gate"], ["product"], name="product"),
                _last("product", "v"),
            ],
            {"v": POINTWISE},
            id="a product",
        ),
        pytest.param(
            [
                helper.make_node("Relu", ["first"], ["on"], name="on"),
                helper.make_node("Conv", ["on", "u"], ["one"], name="one", pads=[1, 1, 1, 1]),
                helper.make_node("Conv", ["on", "v"], ["two"], name="two"),
                helper.make_node("Sigmoid", ["one"], ["gate"], name="gate"),
                helper.make_node("Mul", ["gate", "two"], [LOGITS], name="product"),
            ],
            {"u": RNG.normal(size=(2, 4, 3, 3)), "v": POINTWISE},
            id="one of several users pads",
        ),
        pytest.param(
            [helper.make_node("Identity", ["first"], [LOGITS], name="end")], {}, id="what the network gives"
        ),
    ],
)
def test_what_cannot_give_the_constant_back_is_left_as_it_is(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]
) -> None:
    images = np.random.default_rng(2).integers(0, 256, (8, 8, 8, 3), np.uint8)
    assert centre(_small(*nodes, **constants), images) is None
