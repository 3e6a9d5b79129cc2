"""Where an engine spends its time, layer by layer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field

from runtime.manifest import Backend, EngineError, read_manifest


class Layer(BaseModel):
    """One layer as the backend runs it, which may be several of the graph's in one."""

    name: str
    kind: str = Field(description="e.g. `Convolution`; empty where it is not known")
    kernel: str = Field(description="what computes it, e.g. `brgconv_avx512_I8`; likewise")
    mean_ms: float


# Each module has `profile(folder, manifest, batch, runs) -> list[Layer]`.
_PROFILERS: Final[dict[Backend, str]] = {
    "openvino": "runtime.openvino_profile",
    "tensorrt": "runtime.tensorrt.profile",
    "tensorrt-rtx": "runtime.tensorrt.profile",
}


def profile_layers(folder: Path, batch: int, runs: int) -> list[Layer]:
    """The layers of the engine package in `folder` in their order, with mean times over `runs` batches.

    Raises:
        EngineError: not a usable package, or one of another machine.
    """
    manifest = read_manifest(folder)
    try:
        profiler = importlib.import_module(_PROFILERS[manifest.backend])
    except ImportError as error:
        raise EngineError(f"{folder} needs {manifest.backend}, which cannot be imported: {error}") from error
    layers: list[Layer] = profiler.profile(folder, manifest, batch, runs)
    return layers
