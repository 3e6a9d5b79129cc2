"""Layer by layer, biases and weights with which INT8 gives what FP32 gives.

Each layer of a Q/DQ graph is run on calibration images, with those before it quantised and changed already,
and held against the FP32 graph. Its weights are rounded one input after the other, each taking up what those
before it lost (Frantar et al. 2022, https://arxiv.org/abs/2210.17323). Its bias takes up the mean of what is
left of the difference (Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2). Both have closed
forms: nothing is trained, and the result is the same each time.

To move weights further, to the least square error, was tried and kept fewer labels: it shrinks what it cannot
get right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.kit import INPUT
from builder.prepare.export import open_session
from builder.prepare.qdq import (
    attribute,
    constants_of,
    copy_of,
    quantised_layers,
    replace_constants,
    watch,
)
from builder.weights import LEVELS
from models.preprocessing import Pixels

if TYPE_CHECKING:
    import onnx

POSITIONS: Final = 4096  # of a layer's output that are looked at, over all images
DAMPING: Final = 0.01  # of the mean square of a layer's inputs, added to each of them
_BLOCK: Final = 64

_Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class _Target:
    """What an FP32 layer gives at some of its outputs' positions.

    Attributes:
        places: flat indices into the spatial axes, shape (images, positions).
        sizes: of the spatial axes.
        values: shape (images * positions, channels).
    """

    places: NDArray[np.int64]
    sizes: tuple[int, ...]
    values: _Floats


def reconstruct(
    quantised: onnx.ModelProto, master: onnx.ModelProto, pixels: Pixels, *, weights: bool, seed: int = 0
) -> onnx.ModelProto:
    """The Q/DQ graph with other biases, and other weights if that is asked for.

    Args:
        quantised: with FP32 between the quantised layers.
        master: the FP32 graph that it was made from.
        pixels: training images, uint8 NHWC.
        weights: change weights too.
        seed: chooses the positions that are looked at.
    """
    result = copy_of(quantised)
    floats = constants_of(master)
    sources = {node.name: node for node in master.graph.node}
    stream = _Stream(result, pixels)
    layers = {
        name: layer
        for name, layer in quantised_layers(result).items()
        if _is_plain(layer.node, stream.constants[layer.weights].ndim)
    }
    targets = _targets(master, {name: sources[name].output[0] for name in layers}, pixels, seed)
    for name, layer in layers.items():
        node, target = layer.node, targets[name]
        inputs = stream.run_to(node)
        original = floats[sources[name].input[1]]
        rows = _rows(node, inputs, original, target)
        integers, scale = stream.constants[layer.weights], stream.constants[layer.weights_scale]
        new = {}
        if weights:
            matrices = _round(_as_matrices(node, original), scale.reshape(len(rows), -1, 1), _products(rows))
            integers = _as_weights(node, matrices, original.shape).astype(np.int8)
            new[layer.weights] = integers
        if node.op_type != "MatMul":
            matrices = _as_matrices(node, integers) * scale.reshape(len(rows), -1, 1)
            means = np.einsum("gd,grd->gr", rows.mean(axis=1), matrices).ravel()
            bias = f"{name}/corrected_bias"
            new[bias] = (target.values.mean(axis=0) - means).astype(np.float32)
            del node.input[2:]
            node.input.append(bias)
        replace_constants(result, new)
        stream.constants |= new
    return result


def _is_plain(node: onnx.NodeProto, dimensions: int) -> bool:
    """Whether a layer's arithmetic is what `_rows` and `_as_matrices` say, given its weights' dimensions."""
    if node.op_type == "Conv":
        return attribute(node, "auto_pad", b"NOTSET") == b"NOTSET" and dimensions == 4
    plain = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return plain and not attribute(node, "transA", 0)


def _targets(
    master: onnx.ModelProto, outputs: dict[str, str], pixels: Pixels, seed: int
) -> dict[str, _Target]:
    """By the layers' names; `outputs` are their tensors."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[NDArray[np.int64], tuple[int, ...], _Floats]]] = {
        name: [] for name in outputs
    }
    channels_first = {node.name: node.op_type == "Conv" for node in master.graph.node}
    for values in watch(master, outputs.values(), pixels):
        for name, output in outputs.items():
            value = values[output]
            if channels_first[name]:
                value = np.moveaxis(value, 1, -1)
            sizes = value.shape[1:-1]
            flat = value.reshape(len(value), -1, value.shape[-1])
            count = min(flat.shape[1], -(-POSITIONS // len(pixels)))
            places = np.stack([rng.choice(flat.shape[1], count, replace=False) for _ in flat])
            taken = np.take_along_axis(flat, places[:, :, None], axis=1)
            found[name].append((places, sizes, taken.reshape(-1, value.shape[-1])))
    return {
        name: _Target(
            np.concatenate([places for places, _, _ in parts]),
            parts[0][1],
            np.concatenate([values for _, _, values in parts]),
        )
        for name, parts in found.items()
    }


def _rows(node: onnx.NodeProto, inputs: _Floats, weights: _Floats, target: _Target) -> _Floats:
    """What the layer multiplies with its weights at the target's places; shape (groups, rows, inputs)."""
    images = np.arange(len(inputs))[:, None]
    if node.op_type != "Conv":
        flat = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return flat[images, target.places].reshape(1, -1, inputs.shape[-1])
    groups, strides = attribute(node, "group", 1), attribute(node, "strides", [1, 1])
    pads, dilations = attribute(node, "pads", [0] * 4), attribute(node, "dilations", [1, 1])
    padded = np.pad(inputs, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    height, width = weights.shape[2:]
    y, x = np.unravel_index(target.places, target.sizes)
    y, x = y * strides[0], x * strides[1]
    taps = [
        padded[images, :, y + row * dilations[0], x + column * dilations[1]]
        for row in range(height)
        for column in range(width)
    ]  # each of shape (images, places, channels)
    patches = np.stack(taps, axis=-1)
    patches = patches.reshape(-1, groups, weights.shape[1] * height * width)
    return np.ascontiguousarray(patches.transpose(1, 0, 2))


def _as_matrices(node: onnx.NodeProto, weights: NDArray[Any]) -> NDArray[Any]:
    """Weights as a matrix for each group, shape (groups, outputs, inputs)."""
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return weights.reshape(groups, len(weights) // groups, -1)
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    return (weights if transposed else weights.T)[None]


def _as_weights(node: onnx.NodeProto, matrices: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of `_as_matrices`."""
    transposed = node.op_type != "Conv" and not (node.op_type == "Gemm" and attribute(node, "transB", 0))
    return matrices[0].T if transposed else matrices.reshape(shape)


def _products(rows: _Floats) -> NDArray[np.float64]:
    """Mean products of each two inputs, about their means; shape (groups, inputs, inputs)."""
    centred = (rows - rows.mean(axis=1, keepdims=True)).astype(np.float64)
    products = centred.transpose(0, 2, 1) @ centred / rows.shape[1]
    power = np.trace(products, axis1=1, axis2=2) / rows.shape[2]
    damping = np.maximum(DAMPING * power, 1e-12)[:, None, None] * np.eye(rows.shape[2])
    result: NDArray[np.float64] = products + damping
    return result


def _round(weights: _Floats, scale: _Floats, products: NDArray[np.float64]) -> _Floats:
    """Round one input after the other; the inputs after it take up what that loses.

    Args:
        weights: shape (groups, outputs, inputs).
        scale: shape (groups, outputs, 1).
        products: of the inputs, shape (groups, inputs, inputs).

    Returns:
        Integers, of the shape of `weights`.
    """
    weights, integers = weights.astype(np.float64), np.empty_like(weights)
    inverse = np.linalg.cholesky(np.linalg.inv(products)).transpose(0, 2, 1)
    count = weights.shape[2]
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        errors = np.empty_like(weights[:, :, start:stop])
        for place in range(start, stop):
            column = weights[:, :, place]
            integers[:, :, place] = np.clip(np.rint(column / scale[:, :, 0]), -LEVELS, LEVELS)
            lost = column - integers[:, :, place] * scale[:, :, 0]
            error = lost / inverse[:, place, place, None]
            weights[:, :, place:stop] -= error[:, :, None] * inverse[:, None, place, place:stop]
            errors[:, :, place - start] = error
        weights[:, :, stop:] -= errors @ inverse[:, start:stop, stop:]
    return integers


class _Stream:
    """Runs a graph from layer to layer, all images at once, with the constants as they are by then."""

    def __init__(self, model: onnx.ModelProto, pixels: Pixels) -> None:
        self._model = model
        self.constants = constants_of(model)
        self._fixed: dict[str, onnx.NodeProto] = {}  # what makes a constant of constants, by its output
        self._nodes = []
        for node in model.graph.node:
            if all(not name or name in self.constants or name in self._fixed for name in node.input):
                self._fixed |= dict.fromkeys(node.output, node)
            else:
                self._nodes.append(node)
        self._done = 0
        self._values: dict[str, NDArray[Any]] = {INPUT: pixels}

    def run_to(self, layer: onnx.NodeProto) -> NDArray[np.float32]:
        """The first input of `layer`, after all nodes before it."""
        stop = next(place for place, node in enumerate(self._nodes) if node.name == layer.name)
        part, rest = self._nodes[self._done : stop], self._nodes[stop:]
        self._done = stop
        if part:
            needed = {name for node in rest for name in node.input}
            made = [name for node in part for name in node.output if name in needed]
            self._values |= dict(zip(made, self._run(part, made), strict=True))
            self._values = {name: value for name, value in self._values.items() if name in needed}
        return self._values[layer.input[0]]

    def _run(self, nodes: list[onnx.NodeProto], outputs: list[str]) -> list[NDArray[Any]]:
        from onnx import ValueInfoProto, helper, numpy_helper

        fixed = list(self._needed(nodes))
        names = {name for node in (*fixed, *nodes) for name in node.input}
        given = {name: value for name, value in self._values.items() if name in names}
        graph = helper.make_graph(
            [*fixed, *nodes],
            "part",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                for name, value in given.items()
            ],
            [ValueInfoProto(name=name) for name in outputs],
            [
                numpy_helper.from_array(np.asarray(value, order="C"), name)
                for name, value in self.constants.items()
                if name in names
            ],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        model.ir_version = self._model.ir_version
        session = open_session(model.SerializeToString(), exact=True)
        results: list[NDArray[Any]] = session.run(outputs, given)
        return results

    def _needed(self, nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        """The nodes that make the constants that these need, each once, in order."""
        wanted = {name for node in nodes for name in node.input}
        chosen = []
        for node in reversed(list({id(node): node for node in self._fixed.values()}.values())):
            if wanted & set(node.output):
                chosen.append(node)
                wanted |= set(node.input)
        yield from reversed(chosen)
