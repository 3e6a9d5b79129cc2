"""Master graph to FP16, by NVIDIA ModelOpt's AutoCast."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from builder.kit import INPUT
from builder.prepare.export import KEPT_IN_FP32, quiet
from models.preprocessing import Pixels


def convert_to_fp16(master: Path, path: Path, pixels: Pixels) -> None:
    """Write `master` with FP16 weights and arithmetic; pixels, normalisation and softmax keep their types.

    Args:
        master: graph from `builder.prepare.export`.
        path: the `.onnx` file to write.
        pixels: a few training images, uint8 NHWC; nodes whose values do not fit FP16 on them stay FP32.
    """
    import onnx

    with quiet():
        from modelopt.onnx.autocast import convert_to_mixed_precision
        from modelopt.onnx.logging_config import configure_logging

        configure_logging("CRITICAL")
        model = convert_to_mixed_precision(
            str(master),
            low_precision_type="fp16",
            keep_io_types=True,
            nodes_to_exclude=list(KEPT_IN_FP32),
            calibration_data={INPUT: np.ascontiguousarray(pixels)},
            data_max=65504.0 / 2,
            providers=["cpu"],
        )
    onnx.save(model, str(path))
