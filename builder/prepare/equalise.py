"""Cross-layer equalisation: channels of one tensor get one range, and the next layer's weights undo it.

A tensor has one scale, so a channel of a small range is rounded as coarsely as that of the largest. What
commutes with a positive factor for each channel (convolutions, Relu, pooling, sums) can be scaled without
changing the result (Nagel et al. 2019, https://arxiv.org/abs/1906.04721). Tensors that have to share their
factors, as along residual sums, form a group. How far a group is equalised is what predicts the least error:
factors make the weights that undo them less alike, which costs resolution there.

Clip (Relu6) does not commute with large factors. Factors that stay below its bound for the calibration images
were tried, and made INT8 worse: other images reach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.qdq import attribute, constants_of, copy_of, replace_constants, watch
from builder.weights import LEVELS
from models.preprocessing import Pixels

if TYPE_CHECKING:
    import onnx

EXPONENTS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_LARGEST: Final = 64.0  # factor
# What gives a scaled result for a scaled first input.
_COMMUTING: Final = {
    *("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
    *("Flatten", "Reshape", "Squeeze", "Identity", "ReduceMean"),
}


@dataclass
class _Layer:
    """A convolution or linear layer with constant weights.

    Attributes:
        weights: name of the constant.
        bias: the same; None: it has none.
        outputs: axis of the weights that the output channels lie on.
        depthwise: each output channel has its own input channel alone.
    """

    node: onnx.NodeProto
    weights: str
    bias: str | None
    outputs: int
    depthwise: bool


@dataclass
class _Group:
    """Tensors whose channels have to be scaled alike.

    Attributes:
        producers: the layers that they come from.
        consumers: the layers that they go to.
        blocked: something else is done with them.
    """

    producers: list[_Layer] = field(default_factory=list)
    consumers: list[_Layer] = field(default_factory=list)
    blocked: bool = False


@dataclass(frozen=True)
class _Range:
    """Of each channel of a tensor: the largest magnitude, and the mean square; shape (channels,)."""

    largest: NDArray[np.float64]
    square: NDArray[np.float64]


def equalise(master: onnx.ModelProto, pixels: Pixels) -> onnx.ModelProto | None:
    """The FP32 graph with equalised channels; None: there is nothing to equalise.

    Args:
        master: graph from `builder.prepare.export`.
        pixels: training images, uint8 NHWC, that tell the ranges.
    """
    constants = constants_of(master)
    groups = _groups(master, constants)
    watched = {layer.node.input[0] for group in groups for layer in group.consumers}
    ranges = _ranges(master, watched, pixels)
    changed = dict.fromkeys(name for group in groups for name in _constants(group))
    weights = {name: constants[name].astype(np.float64) for name in changed}
    scaled = False
    for group in groups:
        factors = _factors(group, ranges, weights)
        if (factors == 1).all():
            continue
        scaled = True
        for layer in group.producers:
            weights[layer.weights] *= _along(factors, layer.outputs, weights[layer.weights].ndim)
            if layer.bias is not None:
                weights[layer.bias] *= factors
        for layer in group.consumers:
            inputs = layer.outputs if layer.depthwise else 1 - layer.outputs
            weights[layer.weights] /= _along(factors, inputs, weights[layer.weights].ndim)
    if not scaled:
        return None
    result = copy_of(master)
    replace_constants(result, {name: value.astype(np.float32) for name, value in weights.items()})
    return result


def _constants(group: _Group) -> list[str]:
    layers = [*group.producers, *group.consumers]
    return [name for layer in layers for name in (layer.weights, layer.bias) if name is not None]


def _along(factors: NDArray[np.float64], axis: int, dimensions: int) -> NDArray[np.float64]:
    return factors.reshape([-1 if each == axis else 1 for each in range(dimensions)])


def _groups(model: onnx.ModelProto, constants: Mapping[str, NDArray[Any]]) -> list[_Group]:
    """Groups that can be scaled, in the graph's order."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    def join(names: list[str]) -> None:
        for name in names[1:]:
            parents[root(name)] = root(names[0])

    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    layers, blocked = [], {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        layer = _layer(node, constants, uses)
        if layer is not None:
            layers.append(layer)
            root(node.input[0]), root(node.output[0])
        elif node.op_type in _COMMUTING:
            join([node.input[0], node.output[0]])
        elif node.op_type == "Add" and not set(node.input) & set(constants):
            join([*node.input, node.output[0]])
        else:
            blocked |= {*node.input, *node.output}
    groups: dict[str, _Group] = {}
    for layer in layers:
        groups.setdefault(root(layer.node.output[0]), _Group()).producers.append(layer)
        groups.setdefault(root(layer.node.input[0]), _Group()).consumers.append(layer)
    for name in blocked:
        if root(name) in groups:
            groups[root(name)].blocked = True
    return [group for group in groups.values() if _can_be_scaled(group, constants)]


def _can_be_scaled(group: _Group, constants: Mapping[str, NDArray[Any]]) -> bool:
    if group.blocked or not group.producers or not group.consumers:
        return False
    channels = {constants[layer.weights].shape[layer.outputs] for layer in group.producers}
    channels |= {
        constants[layer.weights].shape[layer.outputs if layer.depthwise else 1 - layer.outputs]
        for layer in group.consumers
    }
    return len(channels) == 1


def _layer(
    node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]], uses: Mapping[str, int]
) -> _Layer | None:
    if node.op_type not in ("Conv", "Gemm") or any(name not in constants for name in node.input[1:]):
        return None
    if any(uses[name] > 1 for name in node.input[1:]):
        return None
    weights, bias = node.input[1], node.input[2] if len(node.input) > 2 else None
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        depthwise = groups > 1 and constants[weights].shape[:2] == (groups, 1)
        return _Layer(node, weights, bias, 0, depthwise) if groups == 1 or depthwise else None
    plain = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or attribute(node, "transA", 0):
        return None
    return _Layer(node, weights, bias, 0 if attribute(node, "transB", 0) else 1, depthwise=False)


def _ranges(model: onnx.ModelProto, tensors: set[str], pixels: Pixels) -> dict[str, _Range]:
    largest: dict[str, NDArray[np.float64]] = {}
    square: dict[str, NDArray[np.float64]] = {}
    for values in watch(model, sorted(tensors), pixels):
        for name, value in values.items():
            others = tuple(axis for axis in range(value.ndim) if axis != 1)
            found, sums = np.abs(value).max(axis=others), np.square(value).mean(axis=others) * len(value)
            largest[name] = np.maximum(largest.get(name, 0), found).astype(np.float64)
            square[name] = square.get(name, 0) + sums.astype(np.float64)
    return {name: _Range(largest[name], square[name] / len(pixels)) for name in tensors}


def _factors(
    group: _Group, ranges: Mapping[str, _Range], weights: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """What each channel is multiplied with, shape (channels,)."""
    found = [ranges[layer.node.input[0]] for layer in group.consumers]
    channels = np.max([each.largest for each in found], axis=0)
    most = channels.max()
    if not most > 0:
        return np.ones_like(channels)
    full = most / np.maximum(channels, most / _LARGEST)
    return min(
        (full**exponent for exponent in EXPONENTS), key=lambda each: _error(each, group, found, weights)
    )


def _error(
    factors: NDArray[np.float64],
    group: _Group,
    ranges: list[_Range],
    weights: Mapping[str, NDArray[np.float64]],
) -> float:
    """The square error of the consumers' outputs that rounding activations and weights should make."""
    total = 0.0
    for layer, found in zip(group.consumers, ranges, strict=True):
        values = weights[layer.weights]
        inputs = layer.outputs if layer.depthwise else 1 - layer.outputs
        rows = np.moveaxis(values, inputs, 0).reshape(values.shape[inputs], -1) / factors[:, None]
        step = (found.largest * factors).max() / LEVELS
        total += step**2 * np.square(rows).sum()
        if not layer.depthwise:
            scaled = values / _along(factors, inputs, values.ndim)
            others = tuple(axis for axis in range(values.ndim) if axis != layer.outputs)
            steps = np.abs(scaled).max(axis=others) / LEVELS
            taps = values.size / (values.shape[0] * values.shape[1])
            total += np.square(steps).sum() * taps * (found.square * factors**2).sum()
    return float(total)
