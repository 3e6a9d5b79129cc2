"""An INT8 network that reads the pixels themselves: no normalisation comes before its first convolution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13

from builder.compile.targets.openvino.constants import constants
from builder.weights import quantise


def fold_normalisation(core: openvino.Core, model: openvino.Model, *, framed: bool = False) -> None:
    """Let a quantised first convolution read the pixels themselves; any other graph stays as it is.

    `(pixels - mean) / std`, rounded to INT8, is a pass over the image of its own, and loses some of it.
    But pixels are 8-bit integers already: the mean, rounded, is their zero point, and what was rounded
    off goes into a bias; the standard deviation goes into the weights.

    Args:
        core: runs what is constant.
        model: changed in place.
        framed: whether the zero point is the same for all channels, as kernels for AMX require. What pads the
            image must be the mean still, so a frame of it is put around the pixels.
    """
    nodes = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
    layout = nodes.get("pre/layout")
    convolution = layout and _only_user(layout)
    # A QuantizeLinear and its DequantizeLinear, and nothing else, may stand before the convolution.
    for kind in ("FakeQuantize", "Convert", "Convert", "Subtract", "Multiply"):
        if convolution is not None and convolution.get_type_name() == kind:
            convolution = _only_user(convolution)
        elif kind == "FakeQuantize":
            return
    if convolution is None or convolution.get_type_name() != "Convolution":
        return

    mean, inverse_std, weights = constants(
        core,
        [nodes["pre/centre"].input_value(1), nodes["pre/scale"].input_value(1), convolution.input_value(1)],
    )
    mean, inverse_std = mean.reshape(1, -1, 1, 1), inverse_std.reshape(1, -1, 1, 1)
    quantised, scale = quantise(weights * inverse_std)
    padding = np.round(mean).astype(np.uint8)
    zero_point = np.full((1, 1, 1, 1), np.round(mean.mean()), np.uint8) if framed else padding
    rest = (
        (scale.astype(np.float64) * quantised * (zero_point - mean)).sum(axis=(1, 2, 3)).reshape(1, -1, 1, 1)
    )

    attributes = convolution.get_attributes()
    images, before, after = model.input(0), attributes["pads_begin"], attributes["pads_end"]
    if framed:
        images = _frame(images, padding.ravel(), before, after)
        before = after = [0, 0]
    pixels = opset13.convert(opset13.transpose(images, np.array([0, 3, 1, 2])), "f32")
    low, high = (np.full((1, 1, 1, 1), value, np.float32) for value in (0, 255))
    pixels = opset13.fake_quantize(pixels, low, high, low, high, levels=256)  # as they are: tells the range
    pixels = opset13.subtract(pixels, opset13.convert(opset13.constant(zero_point), "f32"))
    # A power of two is exact, and one would be optimised away, and with it that this is a quantised input.
    pixels = opset13.multiply(pixels, np.full((1, 1, 1, 1), 2**-8, np.float32))
    folded = opset13.multiply(opset13.convert(opset13.constant(quantised), "f32"), 2**8 * scale)
    users = convolution.output(0).get_target_inputs()
    strides, dilations = attributes["strides"], attributes["dilations"]
    convolved = opset13.convolution(pixels, folded, strides, before, after, dilations)
    convolved.set_friendly_name(convolution.get_friendly_name())  # reports speak of layers by their names
    biased = opset13.add(convolved, rest.reshape(1, -1, 1, 1).astype(np.float32))
    for user in users:
        user.replace_source_output(biased.output(0))
    model.validate_nodes_and_infer_types()


def _frame(
    images: openvino.Output, colour: NDArray[np.uint8], before: Sequence[int], after: Sequence[int]
) -> openvino.Output:
    """Images with so many pixels of that colour above and left of them, and below and right."""
    count = opset13.gather(opset13.shape_of(images), np.array([0]), np.array(0))
    for axis in (2, 1):
        shape = [dimension.get_length() for dimension in list(images.partial_shape)[1:]]

        def strip(width: int, axis: int = axis, shape: list[int] = shape) -> list[openvino.Node]:
            sizes = np.array([*shape[: axis - 1], width, *shape[axis:]])
            return [opset13.broadcast(colour, opset13.concat([count, sizes], 0))] if width else []

        images = opset13.concat([*strip(before[axis - 1]), images, *strip(after[axis - 1])], axis).output(0)
    return images


def _only_user(op: openvino.Node) -> openvino.Node | None:
    users = op.output(0).get_target_inputs()
    return users.pop().get_node() if len(users) == 1 else None
