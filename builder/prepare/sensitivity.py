"""Which layers cost accuracy when they are quantised, and which to keep in higher precision.

Each layer is quantised alone, with the scales that calibration found for it, and the network's
logits are compared with the FP32 ones on calibration images (the ranking of Wu et al. 2020,
https://arxiv.org/abs/2004.09602, section 5.3, by output error instead of accuracy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import run_onnx
from builder.weights import round_to_scale
from models.preprocessing import Pixels

if TYPE_CHECKING:
    import onnx

LARGEST_SHARE: Final = 0.5  # of the layers in higher precision; above this the engine is hardly INT8


@dataclass(frozen=True)
class LayerCost:
    """What quantising one layer does to the network's output.

    Attributes:
        layer: the node's name in the graph.
        error: root mean square of the logits' change, relative to that of the logits.
    """

    layer: str
    error: float


@dataclass(frozen=True)
class LayerScales:
    """The quantisation steps of one layer, of which INT8 has 127 on either side of zero.

    Attributes:
        activation: of its input.
        weights: of each channel, shape (channels,).
        axis: of the weights that the channels lie on.
    """

    activation: float
    weights: NDArray[np.float32]
    axis: int


def rank_layers(
    master: Path,
    quantised: Path,
    pixels: Pixels,
    report: Callable[[str], None],
) -> list[LayerCost]:
    """All layers that `quantised` computes in INT8, the costliest first.

    Args:
        master: the FP32 graph.
        quantised: the static INT8 graph made from it.
        pixels: calibration images, uint8 NHWC.
        report: takes lines of progress.
    """
    import onnx

    model = onnx.load(str(master))
    scales = layer_scales(onnx.load(str(quantised)))
    reference = run_onnx(model, pixels, fused=False)
    norm = float(np.sqrt(np.mean(reference**2)))
    costs = []
    for done, (layer, found) in enumerate(scales.items()):
        report(f"quantising one layer at a time: {done} of {len(scales)}")
        change = run_onnx(_with_one_layer_quantised(model, layer, found), pixels, fused=False) - reference
        costs.append(LayerCost(layer, float(np.sqrt(np.mean(change**2))) / norm))
    return sorted(costs, key=lambda cost: -cost.error)


def fallback_groups(costs: Sequence[LayerCost]) -> Iterator[list[str]]:
    """Ever larger sets of the costliest layers, to be kept in higher precision: 1, 2, 4, ... half of all."""
    size, most = 1, max(1, int(LARGEST_SHARE * len(costs)))
    while size <= most:
        yield [cost.layer for cost in costs[:size]]
        size = most if size < most < 2 * size else 2 * size


def layer_scales(model: onnx.ModelProto) -> dict[str, LayerScales]:
    """The scales of each layer of an INT8 graph whose input and weights are both quantised, by node name."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}

    def dequantize(name: str) -> onnx.NodeProto | None:
        node = producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def scale(node: onnx.NodeProto) -> NDArray[np.float32]:
        return numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)

    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        activation, weights = dequantize(node.input[0]), dequantize(node.input[1])
        if activation is not None and weights is not None and weights.input[0] in constants:
            axis = {a.name: helper.get_attribute_value(a) for a in weights.attribute}.get("axis", 1)
            found[node.name] = LayerScales(float(scale(activation)), scale(weights), axis)
    return found


def _with_one_layer_quantised(master: onnx.ModelProto, layer: str, scales: LayerScales) -> onnx.ModelProto:
    """A copy of the FP32 graph in which one layer sees what it would see in INT8."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.ModelProto()
    model.CopyFrom(master)
    graph = model.graph
    position, node = next((i, node) for i, node in enumerate(graph.node) if node.name == layer)
    weights = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(weights)
    steps = scales.weights.reshape([-1 if axis == scales.axis else 1 for axis in range(values.ndim)])
    integers, scale = round_to_scale(values, steps)
    rounded = integers * scale
    prefix = "sensitivity/"
    graph.initializer.extend(
        [
            numpy_helper.from_array(rounded.astype(np.float32), prefix + "weights"),
            numpy_helper.from_array(np.array(scales.activation, np.float32), prefix + "scale"),
            numpy_helper.from_array(np.array(0, np.int8), prefix + "zero"),
        ]
    )
    scale_and_zero = [prefix + "scale", prefix + "zero"]
    pair = [
        helper.make_node("QuantizeLinear", [node.input[0], *scale_and_zero], [prefix + "q"]),
        helper.make_node("DequantizeLinear", [prefix + "q", *scale_and_zero], [prefix + "dq"]),
    ]
    node.input[0], node.input[1] = prefix + "dq", prefix + "weights"
    nodes = [*graph.node[:position], *pair, *graph.node[position:]]
    del graph.node[:]
    graph.node.extend(nodes)
    return model
