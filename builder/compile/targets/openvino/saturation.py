"""Weights for processors whose INT8 kernels add products in 16 bits.

An x86 processor without VNNI or AMX multiplies unsigned activations by signed weights with `vpmaddubsw`. It
adds each two neighbouring products in 16 bits and saturates: 255 * 127 + 255 * 127 is more than 32767.
OpenVINO calls this the saturation issue
(https://docs.openvino.ai/2024/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html).

No sum saturates where two neighbouring weights of one sign add up to at most 128: 255 * 128 = 32640. Weights
of 7 bits always do. But large weights are seldom neighbours: most layers need to lose much less than a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13

from builder.compile.targets.base import CompileError
from builder.compile.targets.openvino.constants import constants
from builder.weights import LEVELS, SMALLEST_SCALE, IntegerWeights, quantise, round_to_scale
from runtime.openvino import CONFIGURATION

# Layers whose kernels can be tried, and what makes one of the same geometry.
_LAYERS: Final = {
    "Convolution": opset13.convolution,
    "GroupConvolution": opset13.group_convolution,
    "MatMul": opset13.matmul,
}
_ATTRIBUTES: Final = (
    *("strides", "pads_begin", "pads_end", "dilations"),  # of a convolution
    *("transpose_a", "transpose_b"),
)

SAFE_LEVELS: Final = 63  # of weights of 7 bits, on either side of zero

# What may stand between the quantisation of an activation and its use: dequantisation, and changes of shape.
_PASSING: Final = (
    *("Convert", "Subtract", "Multiply"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit"),
)


@cache
def sums_saturate() -> bool:
    """Whether the INT8 kernels that OpenVINO chooses in this process add products in 16 bits.

    A convolution whose sums would saturate tells, whatever the processor and the variables that restrict
    OpenVINO to some of its instructions (ONEDNN_MAX_CPU_ISA).
    """
    channels = 64
    pixels = opset13.parameter([1, channels, 1, 1], np.float32)
    weights = opset13.convert(opset13.constant(np.full((channels, channels, 1, 1), LEVELS, np.int8)), "f32")
    low, high = (np.full((1, 1, 1, 1), value, np.float32) for value in (0, 255))
    activations = opset13.fake_quantize(pixels, low, high, low, high, levels=256)
    scaled = opset13.multiply(weights, np.full((channels, 1, 1, 1), 1 / LEVELS, np.float32))
    sums = opset13.convolution(activations, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    model = openvino.Core().compile_model(openvino.Model([sums], [pixels]), "CPU", CONFIGURATION)
    found = model(np.full((1, channels, 1, 1), 255, np.float32))[0]
    return bool(found.max() < 0.99 * channels * 255)


def make_safe(core: openvino.Core, model: openvino.Model) -> None:
    """Change an INT8 graph so that no sum of two products saturates, in place.

    Args:
        core: computes what is constant, and tries layers.
        model: an INT8 graph as OpenVINO reads it from Q/DQ ONNX.

    Raises:
        CompileError: integer weights that no scale is multiplied with.
    """
    _limit_weights(core, model)
    for op in model.get_ordered_ops():
        if op.get_type_name() == "MatMul":
            _limit_second_operand(core, op)
    model.validate_nodes_and_infer_types()


def pair_neighbours(weights: NDArray[np.floating[Any]], outputs: int, inputs: int) -> IntegerWeights:
    """Round weights to integers of which no two neighbours of one sign add up to more than 128.

    Args:
        weights: float, of any shape.
        outputs: the axis of output channels, each of which gets a scale.
        inputs: the axis of input channels; the first two are neighbours, the next two, and so on.
    """
    rows = np.moveaxis(weights, (outputs, inputs), (0, -1)).reshape(
        weights.shape[outputs], -1, weights.shape[inputs]
    )
    pairs = np.pad(rows, ((0, 0), (0, 0), (0, rows.shape[2] % 2))).reshape(len(rows), -1, 2)
    sums = np.maximum(np.maximum(pairs, 0).sum(2), np.maximum(-pairs, 0).sum(2)).max(1)
    shape = [-1 if axis == outputs else 1 for axis in range(weights.ndim)]
    # To 127: rounding may add half a step to each of the two.
    return round_to_scale(weights, np.maximum(sums / LEVELS, SMALLEST_SCALE).reshape(shape))


def weights_of(model: openvino.Model) -> dict[str, list[openvino.Node]]:
    """The nodes that multiply integer weights of more than 7 bits with their scales, by the integers' names.

    Raises:
        CompileError: integer weights that no scale is multiplied with.
    """
    return {op.get_friendly_name(): list(_products(op)) for op in model.get_ordered_ops() if _is_weights(op)}


def _limit_weights(core: openvino.Core, model: openvino.Model) -> None:
    """Round integer weights as far as is needed; each tensor keeps its shape, and its scales theirs."""
    products = [product for found in weights_of(model).values() for product in found]
    values = constants(core, [product.output(0) for product in products])
    for product, weights in zip(products, values, strict=True):
        scales = product.input_value(1).get_shape()
        limited = _limit(core, weights, scales, list(_layers(product)))
        kind = product.get_output_element_type(0)
        integers = opset13.convert(opset13.constant(limited.integers), kind.to_string())
        scale = opset13.constant(limited.scale.astype(kind.to_dtype()))
        product.input(0).replace_source_output(integers.output(0))
        product.input(1).replace_source_output(scale.output(0))


def _limit(
    core: openvino.Core, weights: NDArray[np.float64], scales: Sequence[int], layers: Sequence[openvino.Node]
) -> IntegerWeights:
    """As few bits less as the layers' kernels allow.

    Args:
        core: tries layers.
        weights: what the integers stand for until now.
        scales: shape of their scales.
        layers: that they belong to.
    """
    axes = [axis for axis, size in enumerate(scales, weights.ndim - len(scales)) if size > 1]
    if axes in ([0], [1]):
        paired = pair_neighbours(weights, axes[0], 1 - axes[0])
        if all(_is_exact(core, layer, paired.integers) for layer in layers):
            return paired
    return quantise(weights, axes=axes, levels=SAFE_LEVELS)


def _layers(product: openvino.Node) -> Iterator[openvino.Node]:
    """What uses these weights, perhaps in another shape."""
    for user in _users(product):
        if user.get_type_name() == "Reshape":
            yield from _layers(user)
        elif user.get_type_name() != "ShapeOf":
            yield user


def _is_exact(core: openvino.Core, layer: openvino.Node, integers: NDArray[np.int8]) -> bool:
    """Whether the layer's kernel computes with these weights what floating point does, in the worst case.

    It is the kernel's choice which weights are neighbours. Activations of 255 make every sum of two products
    of one sign as large as it can be.
    """
    if layer.get_type_name() not in _LAYERS:
        return False
    shape = layer.input(0).get_partial_shape()
    shape[0] = openvino.Dimension(1)
    if shape.is_dynamic:
        return False
    images = opset13.parameter(shape.to_shape(), np.float32)
    low, high = (np.full([1] * len(shape), value, np.float32) for value in (0, 255))
    activations = opset13.fake_quantize(images, low, high, low, high, levels=256)
    integers = integers.reshape(layer.input(1).get_shape())
    scale = np.full([1] * integers.ndim, 1 / LEVELS, np.float32)
    quantised = opset13.multiply(opset13.convert(opset13.constant(integers), "f32"), scale)
    floats = integers.astype(np.float32) / LEVELS
    weights = [quantised, opset13.constant(floats), opset13.constant(np.abs(floats))]
    results = [_like(layer, x, of) for x, of in zip((activations, images, images), weights, strict=True)]
    model = core.compile_model(openvino.Model(results, [images]), "CPU", CONFIGURATION)
    if not _has_integer_kernel(model):
        return False
    found, exact, magnitude = model(np.full(shape.to_shape(), 255, np.float32)).values()
    # One pair that saturates takes away 1 at least; floating point rounds.
    return bool(np.all(np.abs(found - exact) <= 0.5 + 1e-5 * magnitude))


def _has_integer_kernel(model: openvino.CompiledModel) -> bool:
    kernels = (node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops())
    return any(
        kernel["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
        and kernel["runtimePrecision"].astype(str) in ("i8", "u8")
        for kernel in kernels
    )


def _like(layer: openvino.Node, activations: openvino.Node, weights: openvino.Node) -> openvino.Node:
    """The same layer with other inputs."""
    attributes = layer.get_attributes()
    return _LAYERS[layer.get_type_name()](
        activations, weights, *(attributes[name] for name in _ATTRIBUTES if name in attributes)
    )


def _is_weights(op: openvino.Node) -> bool:
    """Whether `op` is a tensor of integers of more than 7 bits; zero points have one dimension at most."""
    return (
        op.get_type_name() == "Constant"
        and op.get_output_element_type(0) == openvino.Type.i8
        and len(op.get_output_partial_shape(0)) > 1
        and np.abs(op.data.astype(np.int16)).max() > SAFE_LEVELS
    )


def _products(integers: openvino.Node) -> Iterator[openvino.Node]:
    """The nodes that multiply these integers with a scale, and so make them weights."""
    for convert in _users(integers):
        node = convert
        for kinds in (("Subtract", "Multiply"), ("Multiply",)):
            if node.get_type_name() != "Multiply":
                users = _users(node)
                if len(users) != 1 or users[0].get_type_name() not in kinds:
                    raise CompileError(
                        f"the INT8 weights {integers.get_friendly_name()} have no scale of their own, and so "
                        "cannot be made safe for this processor, which has no VNNI"
                    )
                (node,) = users
        yield node


def _limit_second_operand(core: openvino.Core, product: openvino.Node) -> None:
    """Round the second operand of a product of two quantised activations to 7 bits.

    It is quantised once more, in steps of twice the size (the largest, where channels have their own). A
    weight, or what is not quantised, stays as it is.
    """
    edge = product.input(1)
    node, scales = edge.get_source_output().get_node(), []
    while node.get_type_name() in _PASSING:
        if node.get_type_name() == "Multiply":
            scales.append(node.input_value(1))
        node = node.input_value(0).get_node()
    if node.get_type_name() != "FakeQuantize":
        return
    least, most, *factors = constants(core, [*node.input_values()[3:], *scales])
    step = 2 * math.prod(factor.max() for factor in factors)
    low, high = np.float32(least.min() * step), np.float32(most.max() * step)
    limited = opset13.fake_quantize(edge.get_source_output(), low, high, low, high, levels=256)
    edge.replace_source_output(limited.output(0))


def _users(node: openvino.Node) -> list[openvino.Node]:
    return [edge.get_node() for edge in node.output(0).get_target_inputs()]
