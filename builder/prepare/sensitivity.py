"""Which layers cost accuracy when they are quantised, and which to keep in higher precision.

Each layer is quantised alone, with the scales that calibration found for it, and the network's
logits are compared with the FP32 ones on calibration images (the ranking of Wu et al. 2020,
https://arxiv.org/abs/2004.09602, section 5.3, by output error instead of accuracy).

Where biases are corrected, the mean of a layer's error does not count: it is most of what depthwise layers
and projections seem to cost. What is left adds up as squares: for EfficientNet-Lite0 to 9.0 % of the logits,
where the whole network in INT8 is 9.5 % off. With the means that would be 14.6 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.mac_share import layer_macs
from builder.prepare.qdq import constants_of, copy_of, exact_logits, quantised_layers
from builder.weights import round_to_scale
from models.preprocessing import Pixels

if TYPE_CHECKING:
    import onnx

# Of the multiply-accumulates in higher precision, at most; above a half the engine is hardly INT8.
BUDGETS: Final = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True)
class LayerCost:
    """What quantising one layer does to the network's output, and what it saves.

    Attributes:
        layer: the node's name in the graph.
        error: root mean square of the logits' change, relative to that of the logits.
        share: of the network's multiply-accumulates.
    """

    layer: str
    error: float
    share: float


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
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    pixels: Pixels,
    report: Callable[[str], None],
    *,
    corrected: bool = False,
) -> list[LayerCost]:
    """All layers that `quantised` computes in INT8, the costliest first.

    Args:
        model: the FP32 graph.
        quantised: the static INT8 graph made from it.
        pixels: calibration images, uint8 NHWC.
        report: takes lines of progress.
        corrected: biases will make up for each layer's mean error.
    """
    scales = layer_scales(quantised)
    macs = layer_macs(model)
    total = max(sum(macs.values()), 1)
    reference = exact_logits(model, pixels)
    norm = float(np.sqrt(np.mean(reference**2)))
    costs = []
    for done, (layer, found) in enumerate(scales.items()):
        report(f"quantising one layer at a time: {done} of {len(scales)}")
        alone = _with_one_layer_quantised(model, layer, found, corrected=corrected)
        change = exact_logits(alone, pixels) - reference
        costs.append(LayerCost(layer, float(np.sqrt(np.mean(change**2))) / norm, macs.get(layer, 0) / total))
    return sorted(costs, key=lambda cost: -cost.error)


def worthwhile_groups(costs: Sequence[LayerCost]) -> Iterator[list[str]]:
    """Ever larger sets of layers to be kept in higher precision, one for each of `BUDGETS`.

    The layers of a set are those that INT8 hurts most for what they compute: errors of layers add up as
    squares, and what a layer saves in INT8 grows with its multiply-accumulates.
    """
    order = sorted(costs, key=lambda cost: -(cost.error**2) / max(cost.share, 1e-9))
    before: list[str] = []
    for budget in BUDGETS:
        chosen, spent = [], 0.0
        for cost in order:
            if spent + cost.share <= budget:
                chosen.append(cost.layer)
                spent += cost.share
        if chosen != before and chosen:
            yield chosen
        before = chosen


def layer_scales(model: onnx.ModelProto) -> dict[str, LayerScales]:
    """The scales of each layer of an INT8 graph whose input and weights are both quantised, by node name."""
    constants = constants_of(model)
    return {
        name: LayerScales(
            activation=float(constants[layer.activation_scale].astype(np.float32)),
            weights=constants[layer.weights_scale].astype(np.float32),
            axis=layer.axis,
        )
        for name, layer in quantised_layers(model).items()
    }


def _with_one_layer_quantised(
    master: onnx.ModelProto, layer: str, scales: LayerScales, *, corrected: bool
) -> onnx.ModelProto:
    """A copy of the FP32 graph in which one layer sees what it would see in INT8.

    Where that is `corrected`, its output has the mean of the layer in FP32, channel by channel, over a batch.
    """
    from onnx import helper, numpy_helper

    model = copy_of(master)
    graph = model.graph
    position, exact = next((i, node) for i, node in enumerate(graph.node) if node.name == layer)
    weights = next(tensor for tensor in graph.initializer if tensor.name == exact.input[1])
    values = numpy_helper.to_array(weights)
    steps = scales.weights.reshape([-1 if axis == scales.axis else 1 for axis in range(values.ndim)])
    integers, scale = round_to_scale(values, steps)
    prefix = "sensitivity/"
    constants: dict[str, NDArray[Any]] = {
        "weights": (integers * scale).astype(np.float32),
        "scale": np.array(scales.activation, np.float32),
        "zero": np.array(0, np.int8),
        "axes": np.array([axis for axis in range(values.ndim) if axis != 1]),
    }
    graph.initializer.extend(
        numpy_helper.from_array(array, prefix + name) for name, array in constants.items()
    )
    scale_and_zero = [prefix + "scale", prefix + "zero"]
    rounded = type(exact).FromString(exact.SerializeToString())
    rounded.name = prefix + "layer"
    rounded.input[0], rounded.input[1] = prefix + "dq", prefix + "weights"
    new = [
        helper.make_node("QuantizeLinear", [exact.input[0], *scale_and_zero], [prefix + "q"]),
        helper.make_node("DequantizeLinear", [prefix + "q", *scale_and_zero], [prefix + "dq"]),
        rounded,
    ]
    if corrected and exact.op_type != "MatMul":  # which has no bias
        output = exact.output[0]
        exact.output[0], rounded.output[0] = prefix + "exact", prefix + "rounded"
        new += [
            exact,
            helper.make_node("Sub", [prefix + "rounded", prefix + "exact"], [prefix + "error"]),
            helper.make_node("ReduceMean", [prefix + "error", prefix + "axes"], [prefix + "mean"]),
            helper.make_node("Sub", [prefix + "rounded", prefix + "mean"], [output]),
        ]
    nodes = [*graph.node[:position], *new, *graph.node[position + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)
    return model
