"""Small graphs of convolutions, whose channels meet in many ways; made without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from small_kit import CLASSES, SIZE, write_small_kit

from builder.kit import INPUT, LOGITS, PROBABILITIES
from models.preprocessing import Pixels


class Layers:
    """Collects the nodes of a graph that takes pixels, as all graphs of a kit do."""

    def __init__(self) -> None:
        self.nodes = [
            helper.make_node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["x"], perm=[0, 3, 1, 2]),
        ]
        self.constants: list[onnx.TensorProto] = []
        self._draw = np.random.default_rng(0)

    def convolution(self, name: str, source: str, inputs: int, outputs: int, groups: int = 1) -> str:
        """A 3x3 convolution with a bias and a ReLU; the name of what it gives."""
        weights = self._draw.normal(size=(outputs, inputs // groups, 3, 3)) / np.sqrt(9 * inputs / groups)
        given = [source, self.constant(f"network/{name}.weight", weights), ""]
        given[2] = self.constant(f"network/{name}.bias", self._draw.normal(size=outputs))
        self.node("Conv", given, f"{name}.sums", pads=[1, 1, 1, 1], group=groups)
        return self.node("Relu", [f"{name}.sums"], name)

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: np.ndarray, dtype: type = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(values.astype(dtype), name))
        return name

    def model(self, last: str, width: int) -> onnx.ModelProto:
        """With a mean of each channel and a matrix product at the end."""
        self.node("GlobalAveragePool", [last], "means")
        flat = self.node(
            "Reshape", ["means", self.constant("shape", np.array([-1, width]), np.int64)], "flat"
        )
        weights = self._draw.normal(size=(CLASSES, width))
        bias = self.constant("network/fc.bias", np.zeros(CLASSES))
        self.node("Gemm", [flat, self.constant("network/fc.weight", weights), bias], LOGITS, transB=1)
        self.node("Softmax", [LOGITS], PROBABILITIES, axis=1)
        graph = helper.make_graph(
            self.nodes,
            "narrow",
            [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", CLASSES])
                for name in (LOGITS, PROBABILITIES)
            ],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


def residual(width: int = 32, inner: int = 48) -> onnx.ModelProto:
    """A stem and a residual block."""
    layers = Layers()
    stem = layers.convolution("stem", "x", 3, width)
    middle = layers.convolution("inner", stem, width, inner)
    branch = layers.convolution("branch", middle, inner, width)
    return layers.model(layers.node("Add", [stem, branch], "sum"), width)


def narrow_kit(folder: Path, model: onnx.ModelProto) -> Path:
    """A kit with that graph in FP32."""
    return write_small_kit(folder, graph=model.SerializeToString())


def pixels(count: int = 2) -> Pixels:
    """Noise."""
    return np.random.default_rng(1).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
