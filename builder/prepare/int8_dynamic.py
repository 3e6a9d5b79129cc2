"""Master graph to dynamic INT8: weights stored as INT8, activation ranges found while running.

Each convolution and linear layer becomes, for every image on its own,

    range = max |x|;   y = range * layer(INT8(x / range), INT8 weights) + bias

Dividing first makes the quantisation scale a constant, 1/127. So this is an ordinary Q/DQ graph,
legal on TensorRT and run by OpenVINO's integer kernels, while the usual operators of dynamic
quantisation (DynamicQuantizeLinear, ConvInteger) are not importable on the one and ran slower than
FP32 on the other. And because each image has its own range, no result depends on which images happen
to share a batch. No calibration images are needed. The layer that sees the image itself stays in
FP32: it has few weights, and quantising it costs more accuracy, and time, than it saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.weights import LEVELS, quantise

if TYPE_CHECKING:
    import onnx

_SMALLEST: Final = np.float32(1e-12)  # an all-zero image has a range to divide by

_SCALE, _ZERO, _FLOOR = "dynamic/scale", "dynamic/zero", "dynamic/smallest_range"


def convert_to_dynamic_int8(master: Path, path: Path) -> None:
    """Write `master` with INT8 weights and run-time activation ranges.

    Args:
        master: graph from `builder.prepare.export`.
        path: the `.onnx` file to write.
    """
    import onnx

    model = onnx.load(str(master))
    _Conversion(model.graph).run()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _is_layer(node: onnx.NodeProto) -> bool:
    """Whether `node` is a plain product plus bias with output channels on the weights' first axis."""
    if node.op_type == "Conv":
        return True
    attributes = {attribute.name: attribute for attribute in node.attribute}
    return (
        node.op_type == "Gemm"
        and "transB" in attributes
        and attributes["transB"].i == 1
        and all(name not in attributes or attributes[name].f == 1 for name in ("alpha", "beta"))
        and ("transA" not in attributes or attributes["transA"].i == 0)
    )


class _Conversion:
    """One graph's rewriting; nodes are collected in their topological order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._non_negative = {node.output[0] for node in graph.node if node.op_type == "Relu"}
        self._images = {name for node in graph.node if node.name.startswith("pre/") for name in node.output}
        self._quantised: dict[str, tuple[str, str]] = {}
        self._constants: set[str] = set()
        self._nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        self._add_constant(_SCALE, np.float32(1 / LEVELS))
        self._add_constant(_ZERO, np.int8(0))
        self._add_constant(_FLOOR, _SMALLEST)
        for node in list(self._graph.node):
            if _is_layer(node) and node.input[1] in self._weights and node.input[0] not in self._images:
                self._quantise(node)
            else:
                self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        for tensor in list(self._graph.initializer):
            if tensor.name not in used:
                self._graph.initializer.remove(tensor)

    def _quantise(self, layer: onnx.NodeProto) -> None:
        output, bias = layer.output[0], layer.input[2] if len(layer.input) > 2 else ""
        axes = len(self._weights[layer.input[1]].dims) - 1  # an image's axes, after the batch
        activation, reach = self._quantise_activation(layer.input[0], axes)
        layer.input[:] = [activation, self._quantise_weights(layer.input[1])]
        layer.output[0] = f"{output}/layer"
        self._nodes.append(layer)
        product = self._add_node("Mul", [layer.output[0], reach], f"{output}/product" if bias else output)
        if bias:
            values = self._values(bias).reshape(-1, *[1] * (axes - 1))
            self._add_node("Add", [product, self._add_constant(f"{output}/bias", values)], output)

    def _quantise_activation(self, name: str, axes: int) -> tuple[str, str]:
        """The tensor scaled to -1..1 and through INT8, and its range of shape (N, 1, ...)."""
        if name not in self._quantised:
            magnitude = name
            if name not in self._non_negative:
                magnitude = self._add_node("Abs", [name], f"{name}/magnitude")
            which = self._add_constant(f"dynamic/axes{axes}", np.arange(1, axes + 1))
            largest = self._add_node("ReduceMax", [magnitude, which], f"{name}/largest", keepdims=1)
            reach = self._add_node("Max", [largest, _FLOOR], f"{name}/range")
            inverse = self._add_node("Reciprocal", [reach], f"{name}/inverse_range")
            unit = self._add_node("Mul", [name, inverse], f"{name}/unit")
            integer = self._add_node("QuantizeLinear", [unit, _SCALE, _ZERO], f"{name}/int8")
            self._quantised[name] = (
                self._add_node("DequantizeLinear", [integer, _SCALE, _ZERO], f"{name}/dequantized"),
                reach,
            )
        return self._quantised[name]

    def _quantise_weights(self, name: str) -> str:
        quantised = f"{name}/dequantized"
        if f"{name}/int8" not in self._constants:
            integers, scale = quantise(self._values(name))
            inputs = [
                self._add_constant(f"{name}/int8", integers),
                self._add_constant(f"{name}/scale", scale.ravel()),
                self._add_constant(f"{name}/zero", np.zeros(len(integers), np.int8)),
            ]
            self._add_node("DequantizeLinear", inputs, quantised, axis=0)
        return quantised

    def _values(self, name: str) -> NDArray[np.float32]:
        from onnx import numpy_helper

        values: NDArray[np.float32] = numpy_helper.to_array(self._weights[name])
        return values

    def _add_constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        from onnx import numpy_helper

        if name not in self._constants:
            self._constants.add(name)
            self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add_node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output
