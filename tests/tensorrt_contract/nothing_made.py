"""Print what is said where TensorRT makes no builder, as without a GPU, and no runtime.

Run as `python nothing_made.py MODULE GRAPH`, over NVIDIA's bindings and stub libraries, which return null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from builder.compile.targets.base import CompileError
from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.options import TensorRTOptions
from runtime.manifest import BatchSizes
from runtime.tensorrt.library import load_tensorrt

if __name__ == "__main__":
    library = load_tensorrt("tensorrt")
    options = TensorRTOptions(profiles=[BatchSizes(min=1, opt=2, max=4)])
    try:
        build_engine(library, Path(sys.argv[2]), options, BuildResources(workspace=64 << 20))
    except CompileError as error:
        print(json.dumps({"builder": str(error), "runtime": library.runtime()}))
