"""Is a quantised ONNX graph one that TensorRT takes? Answered without TensorRT, before any compile.

The rules are those of TensorRT's ONNX importer, from 10.3's to TensorRT-RTX 1.7's: INT8 is explicit
(QuantizeLinear and DequantizeLinear, called Q and DQ below), symmetric, per channel for weights
only, and UINT8 is a type of inputs, not of arithmetic. Where an importer accepts what another one
rejects, or what it then computes differently from ONNX's definition, the stricter rule holds, so
that one graph is right everywhere. `tests/builder/prepare/test_legality.py` holds these rules against
NVIDIA's own importer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from builder.prepare.export import ExportError

Q: Final = "QuantizeLinear"
DQ: Final = "DequantizeLinear"

FLOATS: Final = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
STANDARD_DOMAINS: Final = {"", "ai.onnx"}
# Operators of ONNX's other way to quantise, and of the one that computes scales as it runs.
INTEGER_OPERATORS: Final = {
    "ConvInteger",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
}
OUTPUT_CHANNEL_AXIS: Final = {"Conv": 0, "ConvTranspose": 1}
ACTIVATIONS: Final = {"Relu", "Clip"}  # what TensorRT fuses with a convolution


class IllegalGraphError(ExportError):
    """A graph that TensorRT would reject or compute wrongly; the message lists why and what to do."""


class Finding(NamedTuple):
    """One thing wrong with a graph."""

    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}"


@dataclass(frozen=True)
class Findings:
    """What `check_legality` found.

    Attributes:
        errors: reasons why the graph must not be compiled.
        warnings: what makes it slower or less accurate than it could be.
    """

    errors: list[Finding]
    warnings: list[Finding]


def require_legal(model: onnx.ModelProto) -> list[Finding]:
    """The warnings about a graph that may be compiled.

    Raises:
        IllegalGraphError: it may not.
    """
    findings = check_legality(model)
    if findings.errors:
        lines = "\n".join(f"  {finding}" for finding in findings.errors)
        raise IllegalGraphError(f"no engine can be made of this graph:\n{lines}")
    return findings.warnings


def check_legality(model: onnx.ModelProto) -> Findings:
    """All errors and warnings of a graph, in the order of its nodes."""
    errors: list[Finding] = []
    try:
        # Finds operands of mixed types, which ONNX forbids and a strongly typed network rejects.
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        errors.append(Finding(model.graph.name or "graph", f"not valid ONNX: {str(error).strip()}"))
    graph = _Graph(model.graph)
    return Findings(
        errors + [finding for node in graph.nodes for rule in ERROR_RULES for finding in rule(graph, node)],
        [finding for node in graph.nodes for rule in WARNING_RULES for finding in rule(graph, node)],
    )


class _Graph:
    """A graph with its edges: who makes a tensor, who uses it, which are constant."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self._producers: dict[str, onnx.NodeProto] = {}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.output:
                self._producers[name] = node
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
            value = _attribute(node, "value")
            if node.op_type == "Constant" and value is not None:
                self.constants[node.output[0]] = value
            if node.op_type == "Cast":
                self.types[node.output[0]] = _attribute(node, "to")

    def producer(self, name: str, *operators: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, if it is one of these operators."""
        node = self._producers.get(name)
        return node if node is not None and node.op_type in operators else None

    def consumers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that use a node's first output."""
        return self._consumers.get(node.output[0], [])

    def values(self, name: str) -> NDArray[Any] | None:
        """A constant's values; None if the tensor is not one."""
        tensor = self.constants.get(name)
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def is_weight(self, name: str) -> bool:
        """Is it a constant, or a constant quantised in the graph?"""
        quantize = self.producer(name, Q)
        return name in self.constants or (quantize is not None and quantize.input[0] in self.constants)


Rule = Callable[[_Graph, onnx.NodeProto], Iterator[Finding]]


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _label(node: onnx.NodeProto) -> str:
    name = node.name or node.output[0]
    return f"{name.removeprefix('network/')} ({node.op_type})"  # as the user's own tools show it


def _importable(_: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.domain not in STANDARD_DOMAINS:
        yield Finding(_label(node), f"no target has operators of the domain {node.domain}")
    elif node.op_type in INTEGER_OPERATORS:
        yield Finding(
            _label(node),
            "TensorRT has no such operator; quantise in the Q/DQ format "
            "(ONNX Runtime: QuantFormat.QDQ), with scales fixed by calibration",
        )


def _uint8_only_cast(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type in (Q, DQ):  # they have rules of their own
        return
    if node.op_type == "Cast":
        if graph.types[node.output[0]] == TensorProto.UINT8 and graph.consumers(node):
            yield Finding(
                _label(node), "UINT8 is a type of inputs and outputs, not of tensors between layers"
            )
        return
    for name in node.input:
        if graph.types.get(name) == TensorProto.UINT8:
            yield Finding(
                _label(node), f"{name} is UINT8, which may only feed Cast; put a Cast to float before it"
            )


def _scale(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type not in (Q, DQ):
        return
    scale = graph.values(node.input[1])
    if scale is None:
        yield Finding(_label(node), "the scale is computed in the graph; it must be a constant")
    elif graph.constants[node.input[1]].data_type not in FLOATS:
        yield Finding(_label(node), "the scale must be FP32, FP16 or BF16")
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        yield Finding(
            _label(node), "every scale must be positive and finite; calibrate with images that vary"
        )


def _zero_point(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type not in (Q, DQ):
        return
    if len(node.input) < 3 or not node.input[2]:
        yield Finding(
            _label(node), "the zero point is left out, which means UINT8 in ONNX; write it as INT8 zeros"
        )
        return
    zero_point = graph.values(node.input[2])
    if zero_point is None:
        yield Finding(_label(node), "the zero point is computed in the graph; it must be a constant")
        return
    kind = graph.constants[node.input[2]].data_type
    if kind != TensorProto.INT8:
        hint = " (a quantised bias? leave biases in float: QuantizeBias=False)" * (kind == TensorProto.INT32)
        yield Finding(
            _label(node), f"quantised to {TensorProto.DataType.Name(kind)}; only INT8 is taken{hint}"
        )
    if zero_point.any():
        yield Finding(
            _label(node),
            "the zero point is not 0; quantise symmetrically "
            "(ONNX Runtime: ActivationSymmetric, WeightSymmetric)",
        )


def _constant_type(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    constant = graph.constants.get(node.input[0]) if node.op_type in (Q, DQ) else None
    if constant is None or constant.data_type in (FLOATS if node.op_type == Q else {TensorProto.INT8}):
        return
    yield Finding(
        _label(node),
        f"its constant is {TensorProto.DataType.Name(constant.data_type)}; "
        + (
            "Q takes floats"
            if node.op_type == Q
            else "DQ takes INT8 (leave biases in float: QuantizeBias=False)"
        ),
    )


def _weight_axis(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    scale = graph.values(node.input[1]) if node.op_type in (Q, DQ) and len(node.input) > 1 else None
    if scale is None or scale.size == 1 or not graph.is_weight(node.input[0]):
        return
    axis = _attribute(node, "axis", 1)
    for user in _users_of_weight(graph, node):
        wanted = OUTPUT_CHANNEL_AXIS.get(user.op_type)
        if wanted is not None and axis % 4 != wanted:
            yield Finding(
                _label(node),
                f"the weights of {_label(user)} are scaled along axis {axis}; "
                f"TensorRT fuses INT8 kernels only for output channels, axis {wanted}",
            )


def _users_of_weight(graph: _Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Who computes with the weight that a Q or DQ node carries."""
    users = graph.consumers(node)
    if node.op_type == Q:
        users = [user for dequantize in users for user in graph.consumers(dequantize)]
    return users


def _activation_per_tensor(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type not in (Q, DQ) or graph.is_weight(node.input[0]):
        return
    scale = graph.values(node.input[1])
    if scale is not None and scale.size != 1:
        yield Finding(_label(node), "an activation has one scale per channel; TensorRT takes one per tensor")


def _dq_after_q(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type != DQ or graph.is_weight(node.input[0]) or graph.producer(node.input[0], Q):
        return
    yield Finding(_label(node), "dequantises what neither a Q nor a constant made")


def _per_tensor_weights(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type != DQ or not graph.is_weight(node.input[0]):
        return
    scale = graph.values(node.input[1])
    if scale is not None and scale.size == 1:
        for user in graph.consumers(node):
            if user.op_type in OUTPUT_CHANNEL_AXIS:
                yield Finding(
                    _label(user), "one scale for all weights; one per output channel is more accurate"
                )


def _half_quantised(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type not in OUTPUT_CHANNEL_AXIS:
        return
    quantised = [graph.producer(name, DQ) is not None for name in node.input[:2]]
    if quantised[0] != quantised[1]:
        which = "input is" if quantised[0] else "weights are"
        yield Finding(_label(node), f"only its {which} quantised, so it runs in floating point")


def _fusion_blocked(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type != Q or not graph.producer(node.input[0], *OUTPUT_CHANNEL_AXIS):
        return
    after = {user.op_type for dequantize in graph.consumers(node) for user in graph.consumers(dequantize)}
    if after & ACTIVATIONS:
        yield Finding(
            _label(node), "stands between a convolution and its activation, which blocks their fusion"
        )


def _residual_shortcut(graph: _Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type != "Add" or any(n in graph.constants or graph.producer(n, DQ) for n in node.input):
        return
    convolutions = [graph.producer(name, "Conv") for name in node.input]
    if any(conv is not None and graph.producer(conv.input[0], DQ) for conv in convolutions):
        yield Finding(
            _label(node), "a residual sum without a quantised input; quantise the shortcut to fuse it"
        )


ERROR_RULES: Final[tuple[Rule, ...]] = (
    _importable,
    _uint8_only_cast,
    _scale,
    _zero_point,
    _constant_type,
    _weight_axis,
    _activation_per_tensor,
    _dq_after_q,
)
WARNING_RULES: Final[tuple[Rule, ...]] = (
    _per_tensor_weights,
    _half_quantised,
    _fusion_blocked,
    _residual_shortcut,
)
