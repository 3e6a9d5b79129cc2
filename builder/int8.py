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
from typing import Final, Literal

import numpy as np

from builder.export import INPUT, quiet
from models.preprocessing import Pixels

Method = Literal["entropy", "max"]
METHODS: Final[tuple[Method, ...]] = ("entropy", "max")

_STEP: Final = 8  # images in one calibration step


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
        master: graph from `builder.export`.
        path: the `.onnx` file to write.
        pixels: training images to calibrate with, uint8 NHWC.
        method: activation ranges by least entropy loss or by the largest magnitude.
        rest: precision of what is not quantised; FP32 for CPUs, FP16 for TensorRT.
        exclude: names of nodes to keep in that precision.
    """
    with quiet(), tempfile.TemporaryDirectory() as folder:
        from modelopt.onnx.quantization import quantize

        copy = Path(folder) / "master.onnx"  # ModelOpt rewrites its input file
        shutil.copyfile(master, copy)
        quantize(
            str(copy),
            quantize_mode="int8",
            calibration_data={INPUT: np.ascontiguousarray(pixels)},
            calibration_method=method,
            calibration_shapes=f"{INPUT}:{_STEP}x{'x'.join(map(str, pixels.shape[1:]))}",
            calibration_eps=["cpu"],
            high_precision_dtype=rest,
            dq_only=True,  # else the weights are stored in floating point
            # ModelOpt matches these at the start only, and appends to the list.
            nodes_to_exclude=["pre/.*", "post/.*", *(re.escape(name) + "$" for name in exclude)],
            output_path=str(path),
            log_level="CRITICAL",
        )
