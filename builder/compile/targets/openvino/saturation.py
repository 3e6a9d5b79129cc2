"""Weights for processors whose INT8 kernels add products in 16 bits.

An x86 processor without VNNI or AMX multiplies unsigned activations by signed weights with `vpmaddubsw`,
which adds each two neighbouring products in 16 bits and saturates: 2 * 255 * 127 is more than 32767. OpenVINO
calls this the saturation issue
(https://docs.openvino.ai/2024/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html).
With weights of 7 bits no sum of two products saturates: 2 * 255 * 63 = 32130.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Final

import numpy as np
import openvino
from openvino import opset13

from builder.compile.targets.base import CompileError
from builder.compile.targets.openvino.constants import constants
from builder.weights import LEVELS, quantise
from runtime.openvino import CONFIGURATION

SAFE_LEVELS: Final = 63

# What may stand between the quantisation of an activation and its use: dequantisation, and changes of shape.
_DEQUANTISATION: Final = ("Convert", "Subtract", "Multiply")
_PASSING: Final = (*_DEQUANTISATION, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit")

assert 2 * 255 * SAFE_LEVELS < 2**15 <= 2 * 255 * LEVELS


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

    Weights get 7 bits; so does the second operand of a product of two activations, as attention has them.

    Args:
        core: computes what is constant.
        model: an INT8 graph as OpenVINO reads it from Q/DQ ONNX.

    Raises:
        CompileError: integer weights that no scale is multiplied with.
    """
    limit_weights(core, model, SAFE_LEVELS)
    for op in model.get_ordered_ops():
        if op.get_type_name() == "MatMul":
            _limit_second_operand(core, op)
    model.validate_nodes_and_infer_types()


def limit_weights(core: openvino.Core, model: openvino.Model, levels: int) -> None:
    """Round the integer weights of `model` to so many levels on either side of zero, in place.

    What layer they belong to does not matter: each tensor of integers keeps its shape, and its scales theirs.

    Raises:
        CompileError: integer weights that no scale is multiplied with.
    """
    products = [product for op in model.get_ordered_ops() if _is_weights(op) for product in _products(op)]
    values = constants(core, [product.output(0) for product in products])
    for product, weights in zip(products, values, strict=True):
        scales = product.input_value(1).get_shape()
        axes = [axis for axis, size in enumerate(scales, weights.ndim - len(scales)) if size > 1]
        limited = quantise(weights, axes=axes, levels=levels)
        kind = product.get_output_element_type(0)
        integers = opset13.convert(opset13.constant(limited.integers), kind.to_string())
        scale = opset13.constant(limited.scale.astype(kind.to_dtype()))
        product.input(0).replace_source_output(integers.output(0))
        product.input(1).replace_source_output(scale.output(0))


def _is_weights(op: openvino.Node) -> bool:
    """Whether `op` is a tensor of integers; zero points have one dimension at most."""
    return (
        op.get_type_name() == "Constant"
        and op.get_output_element_type(0) == openvino.Type.i8
        and len(op.get_output_partial_shape(0)) > 1
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

    It is quantised once more, in steps of twice the size. A weight, or what is not quantised, stays as it is.
    """
    edge = product.input(1)
    node, scales = edge.get_source_output().get_node(), []
    while node.get_type_name() in _PASSING:
        if node.get_type_name() == "Multiply":
            scales.append(node.input_value(1))
        node = node.input_value(0).get_node()
    if node.get_type_name() != "FakeQuantize":
        return
    least, most, *factors = (value.item() for value in constants(core, [*node.input_values()[3:], *scales]))
    low, high = (np.float32(2 * limit * math.prod(factors)) for limit in (least, most))
    limited = opset13.fake_quantize(edge.get_source_output(), low, high, low, high, levels=256)
    edge.replace_source_output(limited.output(0))


def _users(node: openvino.Node) -> list[openvino.Node]:
    return [edge.get_node() for edge in node.output(0).get_target_inputs()]
