"""Arithmetic by constants becomes part of the convolution before it, also across a change of the layout.

Networks that were converted from TensorFlow keep images in NHWC: each convolution stands between two
transpositions, and a normalisation is spelled out behind them. Quantisation would see convolutions without
their normalisation, and an engine would compute the rest in floats.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.onnx_file import drop_unused

if TYPE_CHECKING:
    import onnx

_ONE_BY_ONE: Final = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh")
_WITH_CONSTANT: Final = ("Add", "Sub", "Mul", "Div")


def fold_arithmetic(model: onnx.ModelProto) -> None:
    """Move transpositions behind what does not need them, and arithmetic by constants into convolutions.

    Args:
        model: changed; it computes the same.
    """
    _sink_transpositions(model)
    drop_unused(model)
    _fold_into_convolutions(model)
    drop_unused(model)


def _sink_transpositions(model: onnx.ModelProto) -> None:
    """Transpose after operations on single elements instead of before; what undoes another vanishes."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    results = {value.name for value in graph.output}
    transposed: dict[str, tuple[str, list[int]]] = {}  # by output: its input and order of dimensions
    same: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        nodes.append(node)
        if node.op_type == "Transpose":
            order = _order(node)
            source, before = transposed.get(node.input[0], (node.input[0], []))
            if (
                before
                and [before[place] for place in order] == sorted(order)
                and node.output[0] not in results
            ):
                same[node.output[0]] = source
            elif order:
                transposed[node.output[0]] = node.input[0], order
            continue
        varying = [name for name in node.input if name and name not in constants]
        orders = [transposed[name][1] for name in varying if name in transposed]
        one_by_one = node.op_type in (*_ONE_BY_ONE, *_WITH_CONSTANT)
        if not (
            one_by_one and orders and len(orders) == len(varying) and orders.count(orders[0]) == len(orders)
        ):
            continue
        (order, *_), output = orders, node.output[0]
        for place, name in enumerate(node.input):
            if name in transposed:
                node.input[place] = transposed[name][0]
            elif node.op_type in _WITH_CONSTANT:
                values = numpy_helper.to_array(constants[name])
                values = values.reshape((1,) * (len(order) - values.ndim) + values.shape)
                moved = np.ascontiguousarray(values.transpose(np.argsort(order)))
                node.input[place] = f"folded/{output}_{place}"
                graph.initializer.append(numpy_helper.from_array(moved, node.input[place]))
        node.output[0] = f"folded/{output}"
        nodes.append(
            helper.make_node("Transpose", [node.output[0]], [output], f"folded/{output}", perm=order)
        )
        transposed[output] = node.output[0], order
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def _order(node: onnx.NodeProto) -> list[int]:
    return next((list(each.ints) for each in node.attribute if each.name == "perm"), [])


def _fold_into_convolutions(model: onnx.ModelProto) -> None:
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    convolutions: dict[str, onnx.NodeProto] = {}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Conv" and all(name in constants for name in node.input[1:]):
            convolutions[node.output[0]] = node
        if node.op_type not in _WITH_CONSTANT:
            continue
        place = 0 if node.input[0] in convolutions else 1
        convolution, other = convolutions.get(node.input[place]), node.input[1 - place]
        if convolution is None or other not in constants or uses[node.input[place]] != 1:
            continue
        weights, *bias = (numpy_helper.to_array(constants[name]) for name in convolution.input[1:])
        values = _by_channel(numpy_helper.to_array(constants[other]), len(weights), weights.ndim)
        if values is None or (node.op_type == "Div" and place == 1):
            continue
        scale, shift = _as_scale_and_shift(node.op_type, values, first=place == 0)
        changed = {
            "weights": weights * scale.reshape(-1, *[1] * (weights.ndim - 1)),
            "bias": (bias[0] if bias else np.zeros_like(shift)) * scale + shift,
        }
        names = []
        for name, array in changed.items():
            tensor = numpy_helper.from_array(array.astype(np.float32), f"folded/{node.output[0]}_{name}")
            graph.initializer.append(tensor)
            constants[tensor.name] = tensor
            names.append(tensor.name)
        convolution.input[:] = [convolution.input[0], *names]
        convolution.output[0] = node.output[0]
        convolutions[node.output[0]] = convolution
        nodes.pop()
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def _by_channel(values: NDArray[Any], channels: int, dimensions: int) -> NDArray[np.float32] | None:
    """One value for each channel; None if `values` differ in another way."""
    if values.size == 1 and values.ndim <= dimensions:
        return np.full(channels, values.item(), np.float32)
    padded = (1,) * (dimensions - values.ndim) + values.shape
    if padded == (1, channels, *[1] * (dimensions - 2)):
        return np.asarray(values.ravel(), np.float32)
    return None


def _as_scale_and_shift(
    operation: str, values: NDArray[np.float32], *, first: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of a convolution's result, which is the operation's first operand or its second."""
    ones, zeros = np.ones_like(values), np.zeros_like(values)
    if operation == "Sub" and not first:
        return -ones, values
    return {
        "Add": (ones, values),
        "Sub": (ones, -values),
        "Mul": (values, zeros),
        "Div": (ones / values, zeros),
    }[operation]
