"""A Q/DQ graph taken apart: which layers it quantises, with which constants, and how those are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.kit import INPUT, LOGITS
from builder.prepare.export import open_session
from builder.weights import quantise
from models.preprocessing import Pixels

if TYPE_CHECKING:
    import onnx

LAYERS: Final = ("Conv", "Gemm", "MatMul")
SMALLEST_SCALE: Final = 2**-24  # FP16 makes 0 of anything smaller
_BATCH: Final = 8  # images whose tensors are all held at once


@dataclass(frozen=True)
class QuantisedLayer:
    """A layer whose input and weights are both quantised.

    Attributes:
        node: the layer.
        activation: the tensor that is quantised to be its input.
        activation_scale: name of the constant that this is done with.
        weights: name of its integer weights.
        weights_scale: name of the constant that they are multiplied with.
        axis: of the weights that the output channels lie on.
    """

    node: onnx.NodeProto
    activation: str
    activation_scale: str
    weights: str
    weights_scale: str
    axis: int


def quantised_layers(model: onnx.ModelProto) -> dict[str, QuantisedLayer]:
    """The layers that a graph quantises, by the nodes' names, in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}

    def producer(name: str, operator: str) -> onnx.NodeProto | None:
        node = producers.get(name)
        return node if node is not None and node.op_type == operator else None

    found = {}
    for node in model.graph.node:
        if node.op_type not in LAYERS:
            continue
        of_input, of_weights = (producer(name, "DequantizeLinear") for name in node.input[:2])
        quantize = producer(of_input.input[0], "QuantizeLinear") if of_input is not None else None
        if quantize is not None and of_weights is not None and of_weights.input[0] in constants:
            found[node.name] = QuantisedLayer(
                node=node,
                activation=quantize.input[0],
                activation_scale=quantize.input[1],
                weights=of_weights.input[0],
                weights_scale=of_weights.input[1],
                axis=attribute(of_weights, "axis", 1),
            )
    return found


def activation_scales(model: onnx.ModelProto) -> dict[str, str]:
    """The constants that tensors between layers are quantised with, by the tensors' names."""
    return {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def constants_of(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """All constants of a graph."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def replace_constants(model: onnx.ModelProto, values: Mapping[str, NDArray[Any]]) -> None:
    """Give constants other values; those that are not there yet are added."""
    from onnx import numpy_helper

    new = {
        name: numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in values.items()
    }
    for tensor in model.graph.initializer:
        if tensor.name in new:
            tensor.CopyFrom(new.pop(tensor.name))
    model.graph.initializer.extend(new.values())


def quantise_again(
    quantised: onnx.ModelProto, master: onnx.ModelProto, scales: Mapping[str, float]
) -> onnx.ModelProto:
    """The same Q/DQ graph with the weights of another FP32 graph, and other activation scales.

    Args:
        quantised: with FP32 between the quantised layers.
        master: an FP32 graph of the same nodes.
        scales: of the tensors that are to be quantised otherwise.
    """
    result = copy_of(quantised)
    floats = constants_of(master)
    nodes = {node.name: node for node in master.graph.node}
    new: dict[str, NDArray[Any]] = {
        constant: np.array(scales[tensor], np.float32)
        for tensor, constant in activation_scales(quantised).items()
        if tensor in scales
    }
    for name, layer in quantised_layers(quantised).items():
        source = nodes[name]
        weights = floats[source.input[1]]
        integers, scale = quantise(weights, axes=(layer.axis,), smallest_scale=SMALLEST_SCALE)
        new[layer.weights], new[layer.weights_scale] = integers, scale.ravel()
    kept = {tensor.name for tensor in result.graph.initializer} - set(new)
    new |= {name: value for name, value in floats.items() if name in kept}
    replace_constants(result, new)
    return result


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that can be changed."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def watch(
    model: onnx.ModelProto, tensors: Iterable[str], pixels: Pixels
) -> Iterator[dict[str, NDArray[Any]]]:
    """The values of tensors within a graph, a few images at a time."""
    from onnx import ValueInfoProto

    names = list(dict.fromkeys(tensors))
    watched = copy_of(model)
    known = {value.name for value in watched.graph.output}
    watched.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in known)
    session = open_session(watched.SerializeToString(), exact=True)
    for part in np.array_split(pixels, -(-len(pixels) // _BATCH)):
        yield dict(zip(names, session.run(names, {INPUT: part}), strict=True))


def exact_logits(model: onnx.ModelProto, pixels: Pixels) -> NDArray[np.float32]:
    """What a graph gives where its sums are exact, shape (N, classes)."""
    session = open_session(model.SerializeToString(), exact=True)
    parts = np.array_split(pixels, -(-len(pixels) // _BATCH))
    return np.concatenate([session.run([LOGITS], {INPUT: part})[0] for part in parts])
