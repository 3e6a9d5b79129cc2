"""What a compiler for one kind of device offers, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from server.manifest import Backend, BatchSizes, Compatibility, EngineError

if TYPE_CHECKING:
    from builder.tensorrt.options import BuildOptions
    from builder.tensorrt.progress import BuildListener

Rest = Literal["fp32", "fp16"]
Report = Callable[[str], None]


class CompileError(RuntimeError):
    """A graph that could not be compiled; the message says why and what to do."""


@dataclass(frozen=True)
class Artefact:
    """What compiling left in the package's folder.

    Attributes:
        file: name of the artefact in that folder.
        backend_version: of the library that compiled it.
        compatibility: the machine it is for.
        batch: sizes it was compiled for.
        profiles: TensorRT's optimisation profiles, which `batch` spans; empty elsewhere.
        arithmetic: what the backend computes in where not in INT8; None: what the graph says.
    """

    file: str
    backend_version: str
    compatibility: Compatibility
    batch: BatchSizes
    profiles: tuple[BatchSizes, ...] = ()
    arithmetic: Literal["fp32"] | None = None


class Target(Protocol):
    """A compiler: a graph goes in, an artefact for one kind of device comes out.

    Compiling needs neither torch nor ModelOpt, so that it can happen on the device.
    """

    @property
    def backend(self) -> Backend:
        """Written into the manifest; `server.engines.load_engine` picks the runtime by it."""

    def compile(self, graph: Path, folder: Path, batch: BatchSizes, report: Report) -> Artefact:
        """Compile the ONNX file `graph` into `folder`; `report` takes lines of progress.

        Raises:
            CompileError: the graph is illegal for this backend, or the compiler failed.
        """

    def missing_device(self) -> str | None:
        """Why this machine cannot run what it compiles; None where it can."""


# Precision of what an INT8 graph does not quantise: most CPUs have no FP16 arithmetic, every GPU has.
INT8_REST: Final[dict[Backend, Rest]] = {"openvino": "fp32", "tensorrt": "fp16", "tensorrt-rtx": "fp16"}


def open_target(
    backend: Backend, options: BuildOptions | None = None, listener: BuildListener | None = None
) -> Target:
    """The target for that backend.

    Args:
        backend: what to compile with.
        options: for TensorRT; OpenVINO has none.
        listener: told of TensorRT's build phases.

    Raises:
        EngineError: its library is not installed here.
    """
    if backend == "openvino":
        try:
            from builder.openvino import OpenVINOTarget
        except ModuleNotFoundError as error:  # the images for Jetsons do without
            raise EngineError(
                f"openvino cannot be imported: {error}; `pip install openvino` installs it"
            ) from error
        return OpenVINOTarget()
    from builder.tensorrt.options import BuildOptions
    from builder.tensorrt.target import TensorRTTarget

    return TensorRTTarget(backend, options or BuildOptions(), listener)


def choose_backend() -> tuple[Backend, str]:
    """The backend that makes most of this machine, and why."""
    from server.engines.cuda import open_cuda
    from server.engines.tensorrt_library import find_tensorrt

    try:
        library = find_tensorrt()
        open_cuda()
    except EngineError as error:
        return "openvino", str(error).splitlines()[0]
    return library.backend, f"version {library.version} and a GPU are here"
