"""Which parts of a network a Q/DQ graph quantises: some of them are put back into floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder.prepare.qdq import LAYERS, QuantisedLayer, constants_of, copy_of, quantised_layers
from runtime.manifest import LeftOut

if TYPE_CHECKING:
    import onnx


def keep_in_float(
    quantised: onnx.ModelProto, master: onnx.ModelProto, layers: Sequence[str]
) -> onnx.ModelProto:
    """A Q/DQ graph in which some layers are not quantised any more, nor the operands of any residual sum.

    Sums cost no multiply-accumulates, and what they lose is lost for all layers behind them: with a quarter
    of EfficientNet-Lite0 in floating point the logits are 3.2 % off with quantised sums, and 2.8 % without.

    Args:
        quantised: with FP32 between the quantised layers.
        master: the FP32 graph that it was made from.
        layers: names of nodes that are quantised.
    """
    result = copy_of(quantised)
    floats = constants_of(master)
    sources = {node.name: node for node in master.graph.node}
    for name, layer in quantised_layers(result).items():
        if name in layers:
            weights = sources[name].input[1]
            _unquantise_layer(result.graph, layer, weights, floats[weights])
    if layers:
        _unquantise_sums(result.graph)
    _remove_unused(result.graph)
    return result


def leave_out(quantised: onnx.ModelProto, part: LeftOut) -> onnx.ModelProto | None:
    """A Q/DQ graph without Q and DQ in that part; None if it has none there.

    The first layer's weights keep the values that they were rounded to: biases that were corrected for that,
    and networks that were fine-tuned with it, stay right.

    Args:
        quantised: with FP32 or FP16 between the quantised layers.
        part: what is computed in that precision, too.
    """
    result = copy_of(quantised)
    if part == "first layer":
        first = next(node.name for node in result.graph.node if node.op_type in LAYERS)
        layer = quantised_layers(result).get(first)
        if layer is None:
            return None
        weights = _rounded(layer, constants_of(result))
        _unquantise_layer(result.graph, layer, f"{first}/weights", weights)
    elif not _unquantise_sums(result.graph):
        return None
    _remove_unused(result.graph)
    return result


def _rounded(layer: QuantisedLayer, constants: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """A layer's weights as its integers stand for them, in the type of their scales."""
    integers, scale = constants[layer.weights], constants[layer.weights_scale]
    shape = [-1 if axis == layer.axis else 1 for axis in range(integers.ndim)]
    return (integers * scale.astype(np.float32).reshape(shape)).astype(scale.dtype)


def _unquantise_layer(
    graph: onnx.GraphProto, layer: QuantisedLayer, name: str, weights: NDArray[Any]
) -> None:
    """Give a layer its input as it comes, and weights in floating point, in place."""
    from onnx import numpy_helper

    if any(tensor.name == name for tensor in graph.initializer):
        name = f"{layer.node.name}/weights"
    graph.initializer.append(numpy_helper.from_array(weights, name))
    layer.node.input[0], layer.node.input[1] = layer.activation, name


def _unquantise_sums(graph: onnx.GraphProto) -> int:
    """Do not quantise what sums add, in place; how many operands that are."""
    producers = {name: node for node in graph.node for name in node.output}
    changed = 0
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for place, name in enumerate(node.input):
            source = producers.get(name)
            if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in producers:
                node.input[place] = producers[source.input[0]].input[0]
                changed += 1
    return changed


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that nothing needs, in place."""
    needed = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    kept = [type(node).FromString(node.SerializeToString()) for node in reversed(nodes)]
    constants = [type(t).FromString(t.SerializeToString()) for t in graph.initializer if t.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)
