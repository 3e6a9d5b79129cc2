"""Which compiler: the one that is asked for, or the fastest one that this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from builder.compile.targets.base import Target
from runtime.manifest import Backend, EngineError

if TYPE_CHECKING:
    from builder.compile.targets.tensorrt.options import TensorRTOptions
    from builder.compile.targets.tensorrt.progress import BuildListener


def open_target(
    backend: Backend, options: TensorRTOptions | None = None, listener: BuildListener | None = None
) -> Target:
    """The target for that backend.

    Args:
        backend: what to compile with.
        options: for TensorRT; OpenVINO has none.
        listener: follows TensorRT's build phases.

    Raises:
        EngineError: its library is not installed here.
    """
    if backend == "openvino":
        try:
            from builder.compile.targets.openvino.target import OpenVINOTarget
        except ModuleNotFoundError as error:  # the images for Jetsons do without
            raise EngineError(
                f"openvino cannot be imported: {error}; `pip install openvino` installs it"
            ) from error
        return OpenVINOTarget()
    from builder.compile.targets.tensorrt.options import TensorRTOptions
    from builder.compile.targets.tensorrt.target import TensorRTTarget

    return TensorRTTarget(backend, options or TensorRTOptions(), listener)


def choose_backend() -> tuple[Backend, str]:
    """The fastest backend that this machine has, and why."""
    from runtime.cuda import open_cuda
    from runtime.tensorrt.library import find_tensorrt

    try:
        library = find_tensorrt()
        open_cuda()
    except EngineError as error:
        return "openvino", str(error).splitlines()[0] if _has_gpu() else "there is no NVIDIA GPU here"
    return library.backend, f"version {library.version} and a GPU are here"


def _has_gpu() -> bool:
    """Whether a driver of NVIDIA's has made its devices: of PCs, of Jetsons, of Windows' Linux."""
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "nvhost-gpu", "nvgpu", "nvmap", "dxg"))
