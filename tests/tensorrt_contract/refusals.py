"""Print which build options the TensorRT of this process refuses, and with what words.

Run as `python refusals.py MODULE`; `tensorrt` may be NVIDIA's bindings over stub libraries.
"""

from __future__ import annotations

import json
import sys

from builder.compile.targets.tensorrt.options import (
    TensorRTOptions,
    UnsupportedOptionError,
    refuse_unsupported,
)
from runtime.manifest import BatchSizes
from runtime.tensorrt.library import MODULES, TensorRTLibrary, load_tensorrt

FIXED = [BatchSizes(min=8, opt=8, max=8)]
OPTIONS = {
    "defaults": TensorRTOptions(),
    "compute capability 8.6": TensorRTOptions(compute_capabilities=["8.6"]),
    "compute capability 8.7": TensorRTOptions(compute_capabilities=["8.7"]),
    "ampere+": TensorRTOptions(hardware_compatibility="ampere+"),
    "same compute capability": TensorRTOptions(hardware_compatibility="same-compute-capability"),
    "version compatible": TensorRTOptions(version_compatible=True),
    "dla": TensorRTOptions(dla_core=0, profiles=FIXED),
}


def refusal(library: TensorRTLibrary, options: TensorRTOptions) -> str | None:
    try:
        refuse_unsupported(library, options)
    except UnsupportedOptionError as error:
        return str(error)
    return None


if __name__ == "__main__":
    library = load_tensorrt(next(backend for backend, module in MODULES.items() if module == sys.argv[1]))
    said = {name: refusal(library, options) for name, options in OPTIONS.items()}
    print(json.dumps(said | {"version": library.version}))
