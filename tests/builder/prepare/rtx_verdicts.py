"""Print what TensorRT-RTX says of ONNX files: `python rtx_verdicts.py FILE...`, one JSON object a line.

A process of its own, because NVIDIA's importer may crash on a broken graph instead of rejecting it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx

from builder.compile.targets.base import CompileError
from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.options import TensorRTOptions
from runtime.manifest import BatchSizes
from runtime.tensorrt.library import load_tensorrt


def verdict(path: Path) -> dict[str, object]:
    """Does the file compile, and if not, why?"""
    batch = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value
    sizes = BatchSizes(min=batch or 1, opt=batch or 4, max=batch or 8)
    try:
        resources = BuildResources(workspace=1 << 28)
        plan = build_engine(load_tensorrt("tensorrt-rtx"), path, TensorRTOptions(profiles=[sizes]), resources)
    except CompileError as error:
        return {"accepted": False, "reason": str(error)}
    return {"accepted": True, "bytes": len(plan)}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(verdict(Path(name))), flush=True)
