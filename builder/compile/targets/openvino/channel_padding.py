"""Round the channels of a pruned INT8 network up to whole blocks, by zeros that change no result.

oneDNN's INT8 kernels for AMX compute 16 channels at a time. With 57 or 115 channels they lay tensors out anew
between layers, which costs more than pruning gained; with 64 and 128, of which some are zeros, they do not.
Kernels without AMX lose by it, and FP32 kernels do not gain (`benchmarks/NOTES.md`).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13

BLOCK: Final = 16

# What treats all channels alike and keeps finite values finite: the weights that they meet next are zeros.
ELEMENTWISE: Final = {
    "Add",
    "Clamp",
    "Convert",
    "Elu",
    "FakeQuantize",
    "Gelu",
    "HSigmoid",
    "HSwish",
    "Mish",
    "Multiply",
    "PRelu",
    "Relu",
    "Sigmoid",
    "Subtract",
    "Swish",
    "Tanh",
}
POOLING: Final = {"AvgPool", "MaxPool"}
REDUCTIONS: Final = {"ReduceMax", "ReduceMean"}


class _UnknownUseError(Exception):
    """Something is done with padded channels that zeros might change."""


def pad_channels(model: openvino.Model) -> openvino.Model:
    """A model that computes the same, in which every convolution has a multiple of 16 output channels.

    Returns:
        `model` itself where it is not quantised, or does with a padded tensor what is not known to be safe
        (grouped convolutions, concatenation, channels as an output).
    """
    if not any(op.get_type_name() == "FakeQuantize" for op in model.get_ordered_ops()):
        return model
    result = model.clone()
    widths: dict[str, int] = {}  # along axis 1, of nodes whose output is padded
    try:
        for op in result.get_ordered_ops():
            sources = [edge.get_source_output().get_node().get_name() for edge in op.inputs()]
            width = _pad(op, [widths.get(source) for source in sources])
            if width:
                widths[op.get_name()] = width
    except _UnknownUseError:
        return model
    if not widths:
        return model
    result.validate_nodes_and_infer_types()
    return result


def _pad(op: openvino.Node, widths: list[int | None]) -> int | None:
    """Change one node for inputs of these new widths (None: as before); the width of its output.

    Shapes are those before padding: the model is validated again only at the end.
    """
    kind = op.get_type_name()
    if kind == "Convolution":
        return _pad_convolution(op, widths)
    padded = {width for width in widths if width}
    if not padded:
        return None
    users = op.output(0).get_target_inputs() if op.outputs() else set()
    if kind == "ShapeOf" and all(user.get_node().get_type_name() == "ShapeOf" for user in users):
        return None  # asks for the number of dimensions only
    if len(padded) > 1 or any(output.get_target_inputs() for output in op.outputs()[1:]):
        raise _UnknownUseError
    (width,) = padded
    if kind in ELEMENTWISE:
        _pad_operands(op, widths, width)
    elif kind in REDUCTIONS:
        axes = set(_value(op.input_value(1)).ravel())
        if len(op.input_value(0).partial_shape) != 4 or not axes <= {2, 3, -2, -1}:
            raise _UnknownUseError
    elif kind == "Reshape":
        return _pad_flattened(op, width)
    elif kind == "MatMul":
        attributes = op.get_attributes()
        if widths[1] or attributes["transpose_a"] or not attributes["transpose_b"]:
            raise _UnknownUseError
        _replace(op, 1, _padded_weights(op.input_value(1), (_sizes(op.input_value(1))[0], width)))
        return None
    elif kind not in POOLING:
        raise _UnknownUseError
    return width


def _pad_convolution(op: openvino.Node, widths: list[int | None]) -> int | None:
    outputs, inputs, *_ = _sizes(op.input_value(1))
    if widths[1]:
        raise _UnknownUseError  # weights that are computed
    width = -(-outputs // BLOCK) * BLOCK
    if width == outputs and not widths[0]:
        return None
    _replace(op, 1, _padded_weights(op.input_value(1), (width, widths[0] or inputs)))
    return width if width != outputs else None


def _pad_operands(op: openvino.Node, widths: list[int | None], width: int) -> None:
    """Constants of one value for each channel get zeros; those of one value for all stay."""
    sources = op.input_values()
    shapes = [source.partial_shape for source, new in zip(sources, widths, strict=True) if new]
    rank = len(shapes[0])
    if any(len(shape) != rank or shape[1] != shapes[0][1] for shape in shapes):
        raise _UnknownUseError  # one of them is broadcast
    for place, source in enumerate(sources):
        if widths[place]:
            continue
        values = _value(source)
        if values.size == 1:
            continue
        values = values.reshape((1,) * (rank - values.ndim) + values.shape)
        per_channel = (1, shapes[0][1].get_length()) + (1,) * (rank - 2)
        if values.shape != per_channel or op.get_type_name() not in ("Add", "Subtract", "Multiply"):
            raise _UnknownUseError
        _replace(op, place, opset13.constant(_grown(values, (1, width))).output(0))


def _pad_flattened(op: openvino.Node, width: int) -> int:
    """(images, channels, rows, columns) as (images, values): padding stays at the end of each."""
    channels, *rest = _sizes(op.input_value(0), 1)
    if _sizes(op.output(0), 1) != [channels * math.prod(rest)]:
        raise _UnknownUseError
    images, _ = _value(op.input_value(1))
    flat = width * math.prod(rest)
    _replace(op, 1, opset13.constant(np.array([images, flat], np.int64)).output(0))
    return flat


def _padded_weights(weights: openvino.Output, shape: tuple[int, int]) -> openvino.Output:
    """Weights (outputs, inputs, ...) with zeros added to both; INT8 stays INT8."""
    product = weights.get_node()
    if product.get_type_name() != "Multiply":
        return opset13.constant(_grown(_value(weights), shape)).output(0)
    scale, quantised = _value(product.input_value(1)), product.input_value(0)
    if quantised.get_node().get_type_name() == "Subtract":
        if _value(quantised.get_node().input_value(1)).any():
            raise _UnknownUseError
        quantised = quantised.get_node().input_value(0)
    integers = _grown(_root(quantised).data, shape)
    scale = scale.reshape(scale.shape + (1,) * (integers.ndim - scale.ndim))
    if scale.size > 1:
        scale = _grown(scale, (shape[0], 1), mode="edge")
    floats = opset13.convert(opset13.constant(integers), "f32")
    return opset13.multiply(floats, opset13.constant(scale)).output(0)


def _grown(values: NDArray[Any], shape: tuple[int, int], mode: Any = "constant") -> NDArray[Any]:
    """With so many entries along the first two axes."""
    more = [(0, wanted - found) for wanted, found in zip(shape, values.shape, strict=False)]
    return np.pad(values, more + [(0, 0)] * (values.ndim - len(more)), mode=mode)


def _value(output: openvino.Output) -> NDArray[Any]:
    """A constant, perhaps converted and reshaped."""
    data: NDArray[Any] = _root(output).data
    kind = output.get_element_type().to_dtype()
    return data.astype(kind).reshape(_sizes(output))


def _root(output: openvino.Output) -> openvino.Node:
    node = output.get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        raise _UnknownUseError
    return node


def _sizes(output: openvino.Output, start: int = 0) -> list[int]:
    """Its dimensions from that axis on."""
    dimensions = list(output.partial_shape)[start:]
    if any(dimension.is_dynamic for dimension in dimensions):
        raise _UnknownUseError
    return [dimension.get_length() for dimension in dimensions]


def _replace(op: openvino.Node, place: int, source: openvino.Output) -> None:
    op.input(place).replace_source_output(source)
