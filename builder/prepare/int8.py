"""Master graph to static INT8: explicit Q/DQ, calibrated by NVIDIA ModelOpt.

Weights are symmetric per output channel and stored as INT8, activations symmetric per tensor; this
one form is what TensorRT 10.3 to 11 and OpenVINO both run with integer kernels.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from builder.kit import INPUT
from builder.prepare.export import KEPT_IN_FP32, quiet
from builder.weights import LEVELS, quantise
from models.preprocessing import Pixels

Method = Literal["entropy", "max"]
METHODS: Final[tuple[Method, ...]] = ("entropy", "max")

_STEP: Final = 8  # images in one calibration step, at most


def convert_to_int8(
    master: Path,
    path: Path,
    pixels: Pixels,
    *,
    method: Method,
    rest: Literal["fp32", "fp16"],
    exclude: Sequence[str] = (),
) -> None:
    """Write `master` with INT8 convolutions and matrix products.

    Args:
        master: graph from `builder.prepare.export`.
        path: the `.onnx` file to write.
        pixels: training images to calibrate with, uint8 NHWC.
        method: activation ranges by least entropy loss or by the largest magnitude.
        rest: precision of what is not quantised; FP32 for CPUs, FP16 for TensorRT.
        exclude: names of nodes to keep in that precision.
    """
    step = min(_STEP, len(pixels))
    with quiet(), tempfile.TemporaryDirectory() as folder:
        from modelopt.onnx.quantization import quantize

        copy = Path(folder) / "master.onnx"  # ModelOpt rewrites its input file
        shutil.copyfile(master, copy)
        quantize(
            str(copy),
            quantize_mode="int8",
            calibration_data={INPUT: np.ascontiguousarray(pixels)},
            calibration_method=method,
            calibration_shapes=f"{INPUT}:{step}x{'x'.join(map(str, pixels.shape[1:]))}",
            calibration_eps=["cpu"],
            high_precision_dtype=rest,
            dq_only=True,  # else the weights are stored in floating point
            # ModelOpt matches these at the start only, and appends to the list.
            nodes_to_exclude=[*KEPT_IN_FP32, *(re.escape(name) + "$" for name in exclude)],
            output_path=str(path),
            log_level="CRITICAL",
        )
    if rest == "fp32":
        _quantise_first_layer(path, exclude)


def _quantise_first_layer(path: Path, exclude: Sequence[str]) -> None:
    """Quantise the convolution that sees the image, for CPUs, if ModelOpt has not.

    TensorRT has no INT8 kernel for three input channels where the output channels are no multiple of
    eight, as after pruning, and so ModelOpt leaves such a layer as it is. A CPU then spends a third of
    the network's time on it. Pixels need no calibration: their range is known.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    (pixels,) = (node.output[0] for node in graph.node if node.name == "pre/layout")
    users = [node for node in graph.node if pixels in node.input]
    layer = users[0]
    if len(users) > 1 or layer.op_type != "Conv" or layer.name in exclude or layer.input[1] not in tensors:
        return
    mean, inverse_std = (numpy_helper.to_array(tensors[f"pre/{name}"]) for name in ("mean", "inverse_std"))
    reach = np.max(np.maximum(mean, 255 - mean) * inverse_std)
    weights = numpy_helper.to_array(tensors[layer.input[1]])
    integers, scale = quantise(weights)
    name = layer.input[1]
    constants: dict[str, NDArray[Any]] = {
        f"{pixels}_scale": np.array(reach / LEVELS, np.float32),
        f"{pixels}_zero_point": np.array(0, np.int8),
        f"{name}_int8": integers,
        f"{name}_scale": scale.ravel(),
        f"{name}_zero_point": np.zeros(len(scale), np.int8),
    }

    def convert(kind: str, tensor: str, of: str, **attributes: Any) -> onnx.NodeProto:
        inputs = [tensor, f"{of}_scale", f"{of}_zero_point"]
        return helper.make_node(kind, inputs, [f"{tensor}_{kind}_Output"], f"{tensor}_{kind}", **attributes)

    to_int8 = convert("QuantizeLinear", pixels, pixels)
    of_pixels = convert("DequantizeLinear", to_int8.output[0], pixels)
    of_weights = convert("DequantizeLinear", f"{name}_int8", name, axis=0)
    layer.input[0], layer.input[1] = of_pixels.output[0], of_weights.output[0]
    place = list(graph.node).index(layer)
    for node in (of_weights, of_pixels, to_int8):
        graph.node.insert(place, node)
    graph.initializer.remove(tensors[name])
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
