"""How much a graph stores and computes, and how much of that in INT8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def count_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions and matrix products, for one image."""
    return sum(macs for _, macs, _ in _layers(model))


def layer_macs(model: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of each convolution and matrix product for one image, by the nodes' names."""
    return {name: macs for name, macs, _ in _layers(model)}


def int8_share(model: onnx.ModelProto) -> float:
    """Share of the multiply-accumulates whose operands are both quantised; 0 to 1."""
    layers = _layers(model)
    total = sum(macs for _, macs, _ in layers)
    return sum(macs for _, macs, quantised in layers if quantised) / total if total else 0.0


def count_weights_bytes(model: onnx.ModelProto) -> int:
    """What its constants take, as they are stored."""
    import onnx

    return sum(onnx.numpy_helper.to_array(weight).nbytes for weight in model.graph.initializer)


def _layers(model: onnx.ModelProto) -> list[tuple[str, int, bool]]:
    """Name and multiply-accumulates of each layer, and whether it runs in INT8."""
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(model)
    del single.graph.value_info[:]
    for value in single.graph.input:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = tuple(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    # Integer operators take tensors of 8 bits, which is all there is to know.
    layers = []
    for node in graph.node:
        macs = _macs(node, shapes)
        if macs:
            integers = node.op_type.endswith("Integer")
            layers.append((node.name, macs, integers or all(name in dequantised for name in node.input[:2])))
    return layers


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    result = shapes.get(node.output[0])
    if result is None or len(node.input) < 2:
        return 0
    first, second = shapes.get(node.input[0], ()), shapes.get(node.input[1], ())
    if node.op_type in ("Conv", "ConvInteger"):
        return int(np.prod(result) * np.prod(second[1:]))
    if node.op_type == "ConvTranspose":
        return int(np.prod(first) * np.prod(second[1:]))
    if node.op_type in ("MatMul", "MatMulInteger") and first:
        return int(np.prod(result) * first[-1])
    if node.op_type == "Gemm" and first:
        return int(np.prod(result) * first[0 if _attribute(node, "transA") else -1])
    return 0


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
