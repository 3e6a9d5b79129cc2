"""Centring: tensors lie about zero, where symmetric INT8 has as many steps on either side.

What lies between 0 and 6, as after Relu6, uses one half of the steps. A constant that one layer's bias takes
away, and the next one's gives back, changes nothing in FP32 and makes all of them useful. The bounds of a
Clip between both move along; Relu becomes a Clip. Where no activation follows a layer, each of its channels
gets a constant of its own, its mean, also along residual sums.

A layer that pads its input with zeros would see the constant end at the border, and keeps its input as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.qdq import attribute, constants_of, copy_of, replace_constants, watch
from builder.prepare.ranges import least_error_scales
from builder.weights import LEVELS
from models.preprocessing import Pixels

if TYPE_CHECKING:
    import onnx

_ACTIVATIONS: Final = ("Relu", "Clip")

_Floats = NDArray[np.floating[Any]]


def centre(master: onnx.ModelProto, pixels: Pixels) -> onnx.ModelProto | None:
    """The FP32 graph with centred tensors; None: there is nothing to centre.

    Args:
        master: graph from `builder.prepare.export`.
        pixels: training images, uint8 NHWC, that tell the ranges.
    """
    result = copy_of(master)
    constants = constants_of(master)
    wanted = _wanted(result, constants)
    if not wanted:
        return None
    centres = _centres(master, wanted, pixels)
    shifts: dict[str, _Floats] = {}  # what has been taken away from a tensor, of each channel
    new: dict[str, NDArray[Any]] = {}
    followers = {node.input[0]: node for node in result.graph.node if node.output[0] in wanted}
    for node in result.graph.node:
        given, output = shifts.get(node.input[0]), node.output[0]
        if _is_layer(node, constants):
            follower = followers.get(output)
            taken = centres.get(follower.output[0] if follower is not None else output)
            if taken is not None:
                shifts[output] = taken
            if given is not None or taken is not None:
                _shift_bias(node, constants, given, taken, new)
        elif output in centres:
            shifts[output] = centres[output]
            _shift_bounds(node, constants, float(centres[output][0]), new)
        elif node.op_type == "Add" and any(name in shifts for name in node.input):
            shifts[output] = sum((shifts[name] for name in node.input if name in shifts), start=np.zeros(1))
        elif given is not None:
            shifts[output] = given
    replace_constants(result, new)
    return result


def _wanted(model: onnx.ModelProto, constants: Mapping[str, NDArray[Any]]) -> dict[str, onnx.NodeProto]:
    """The tensors that can be centred, with the nodes that make them: layers, or activations after layers."""
    nodes = model.graph.node
    users: dict[str, list[onnx.NodeProto]] = {value.name: [] for value in model.graph.output}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    producers = {node.output[0]: node for node in nodes}
    outputs = {value.name for value in model.graph.output}
    free: set[str] = set()  # whose users can do with another zero

    def can_shift(user: onnx.NodeProto, name: str) -> bool:
        if _is_layer(user, constants):
            return name == user.input[0] and name not in user.input[1:] and not _pads(user)
        if user.op_type == "Add":
            return user.output[0] in free and not set(user.input) & set(constants)
        if user.op_type in ("Flatten", "Squeeze", "Reshape"):
            return user.output[0] in free and producers[name].op_type == "GlobalAveragePool"
        return user.op_type == "GlobalAveragePool" and user.output[0] in free

    for node in reversed(nodes):
        name = node.output[0]
        if name not in outputs and all(can_shift(user, name) for user in users[name]):
            free.add(name)
    found = {}
    for node in nodes:
        name = node.output[0]
        if name in free and _is_layer(node, constants):
            found[name] = node
        elif name in free and _is_one_sided(node, constants):
            before = producers.get(node.input[0])
            if before is not None and _is_layer(before, constants) and len(users[node.input[0]]) == 1:
                found[name] = node
    return found


def _is_layer(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> bool:
    if node.op_type not in ("Conv", "Gemm") or any(name not in constants for name in node.input[1:]):
        return False
    return node.op_type == "Conv" or (
        all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        and not attribute(node, "transA", 0)
    )


def _pads(layer: onnx.NodeProto) -> bool:
    return attribute(layer, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or any(
        attribute(layer, "pads", ())
    )


def _is_one_sided(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> bool:
    """Whether it is an activation whose least value is 0."""
    if node.op_type == "Relu":
        return True
    low, *rest = [*node.input[1:], ""] if node.op_type == "Clip" else [""]
    return (
        low in constants and not constants[low].any() and all(not name or name in constants for name in rest)
    )


def _centres(
    master: onnx.ModelProto, wanted: Mapping[str, onnx.NodeProto], pixels: Pixels
) -> dict[str, _Floats]:
    """What is taken away from each tensor: a constant after activations, else one for each channel."""
    clipped = [name for name, node in wanted.items() if node.op_type in _ACTIVATIONS]
    scales = least_error_scales(master, clipped, pixels, levels=2 * LEVELS)
    centres: dict[str, _Floats] = {name: np.array([LEVELS * scale]) for name, scale in scales.items()}
    linear = [name for name in wanted if name not in centres]
    for values in watch(master, linear, pixels):
        for name, value in values.items():
            others = tuple(axis for axis in range(value.ndim) if axis != 1)
            part = value.mean(axis=others, dtype=np.float64) * len(value) / len(pixels)
            centres[name] = centres.get(name, 0) + part
    return centres


def _shift_bias(
    layer: onnx.NodeProto,
    constants: Mapping[str, NDArray[Any]],
    given: _Floats | None,
    taken: _Floats | None,
    new: dict[str, NDArray[Any]],
) -> None:
    """Let a layer's bias make up for what its input lacks, and take away what its output shall lack."""
    weights = constants[layer.input[1]].astype(np.float64)
    if layer.op_type == "Gemm":
        weights = weights if attribute(layer, "transB", 0) else weights.T
    groups = attribute(layer, "group", 1)
    rows = weights.reshape(groups, len(weights) // groups, weights.shape[1], -1).sum(axis=3)
    bias = np.zeros(len(weights))
    if len(layer.input) > 2:
        bias += constants[layer.input[2]].astype(np.float64)
    if given is not None:
        inputs = np.broadcast_to(given, groups * rows.shape[2]).reshape(groups, 1, -1)
        bias += (rows * inputs).sum(axis=2).ravel()
    if taken is not None:
        bias -= taken
    name = f"{layer.name}/centred_bias"
    new[name] = bias.astype(np.float32)
    del layer.input[2:]
    layer.input.append(name)


def _shift_bounds(
    node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]], centre: float, new: dict[str, NDArray[Any]]
) -> None:
    bounds = [0.0, *(float(constants[name]) for name in node.input[2:] if name)]
    node.op_type = "Clip"
    del node.input[1:]
    for side, bound in zip(("low", "high"), bounds, strict=False):
        name = f"{node.name}/{side}"
        new[name] = np.array(bound - centre, np.float32)
        node.input.append(name)
