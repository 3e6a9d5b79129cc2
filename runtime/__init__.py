"""What runs an engine package: its manifest, the backends, and the threads they run on. Never needs torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.loading import load_engine

__all__ = ["load_engine"]

# OpenVINO reports that it is imported, and keeps a file in the home folder for that: users without one get an
# error, and those who may not write to theirs are warned. Where this module is missing it reports nothing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    if name == "load_engine":  # imported only when it is asked for: `runtime.threads` alone needs no NumPy
        from runtime.loading import load_engine

        return load_engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
