"""What is compiled: a student becomes ONNX, gets its precision, and is published as an engine package.

>>> from builder import build
>>> packages = build("runs/photos/pruned", "engines")

`docs/api.md` describes these names. Importing this package imports none of them: each is loaded when it is
first used, so compiling on a device needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from builder.api import build, make_kit
    from builder.compile.packages import Package
    from builder.compile.targets.tensorrt.options import TensorRTOptions
    from builder.compile.verification import Gate, GateError
    from builder.fitting import FittingDevice
    from builder.latency import LatencyOptions, measure_layers
    from builder.observer import BuildObserver
    from builder.options import BuildOptions
    from builder.prepare.options import PrepareOptions
    from builder.prepare.teacher import open_teacher

__all__ = [
    "BuildObserver",
    "BuildOptions",
    "FittingDevice",
    "Gate",
    "GateError",
    "LatencyOptions",
    "Package",
    "PrepareOptions",
    "TensorRTOptions",
    "build",
    "make_kit",
    "measure_layers",
    "open_teacher",
]

_MODULES: Final = {
    "BuildObserver": "builder.observer",
    "BuildOptions": "builder.options",
    "FittingDevice": "builder.fitting",
    "Gate": "builder.compile.verification",
    "GateError": "builder.compile.verification",
    "LatencyOptions": "builder.latency",
    "Package": "builder.compile.packages",
    "PrepareOptions": "builder.prepare.options",
    "TensorRTOptions": "builder.compile.targets.tensorrt.options",
    "build": "builder.api",
    "make_kit": "builder.api",
    "measure_layers": "builder.latency",
    "open_teacher": "builder.prepare.teacher",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
