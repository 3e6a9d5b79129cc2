"""How many layers of a graph have 2:4 sparse weights, for which NVIDIA's GPUs since Ampere have kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.kit import Sparsity
from builder.prepare.qdq import LAYERS, attribute, constants_of

if TYPE_CHECKING:
    import onnx

_GROUP: Final = 4
_ZEROS: Final = 2  # of each group


def count_sparse_layers(model: onnx.ModelProto) -> Sparsity:
    """Layers with constant weights, in floating point or INT8, and those of them that are 2:4."""
    constants = constants_of(model)
    # INT8 weights are dequantised in the graph; a zero stays one.
    constants |= {
        node.output[0]: constants[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    found = [
        is_sparse(constants[node.input[1]], axis=_input_axis(node))
        for node in model.graph.node
        if node.op_type in LAYERS and node.input[1] in constants
    ]
    return Sparsity(layers=len(found), sparse=sum(found))


def is_sparse(weights: NDArray[Any], axis: int) -> bool:
    """Whether at least two of every four weights along the axis of the input channels are zero."""
    channels = np.moveaxis(weights, axis, -1)
    if channels.shape[-1] % _GROUP:
        return False
    zeros = (channels.reshape(-1, _GROUP) == 0).sum(axis=1)
    return bool((zeros >= _ZEROS).all())


def _input_axis(node: onnx.NodeProto) -> int:
    """Of a layer's weights that the input channels lie on."""
    if node.op_type == "MatMul":
        return -2
    return 0 if node.op_type == "Gemm" and not attribute(node, "transB", 0) else 1
