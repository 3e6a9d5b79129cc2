"""The float graph that peers serve is the pixels graph, less its first nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.engine import SPEC, take_float_tensors
from builder.kit import LOGITS
from builder.prepare.export import add_pixels_input, run_onnx


def small_network() -> onnx.ModelProto:
    weights = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], strides=[32, 32]),
            helper.make_node("GlobalAveragePool", ["c"], ["p"]),
            helper.make_node("Flatten", ["p"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_both_graphs_give_the_same_logits(tmp_path: Path) -> None:
    pixels_graph, float_graph = tmp_path / "pixels.onnx", tmp_path / "float.onnx"
    onnx.save(add_pixels_input(small_network(), SPEC), str(pixels_graph))
    take_float_tensors(pixels_graph, float_graph)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    tensors = ((pixels / 255 - SPEC.mean) / SPEC.std).transpose(0, 3, 1, 2).astype(np.float32)

    session = onnxruntime.InferenceSession(str(float_graph), providers=["CPUExecutionProvider"])
    (input_,) = session.get_inputs()
    logits = session.run([LOGITS], {input_.name: tensors})[0]

    assert input_.type == "tensor(float)"
    np.testing.assert_allclose(logits, run_onnx(pixels_graph, pixels), atol=1e-4)
