"""What a compiler for one kind of device offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from builder.kit import Report, Rest
from models.errors import TrimRTError
from runtime.manifest import Backend, BatchSizes, Compatibility


class CompileError(TrimRTError):
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
        saturation_safe: whether no sum of two products of INT8 saturates in 16 bits.
    """

    file: str
    backend_version: str
    compatibility: Compatibility
    batch: BatchSizes
    profiles: tuple[BatchSizes, ...] = ()
    arithmetic: Literal["fp32"] | None = None
    saturation_safe: bool = False


class Target(Protocol):
    """A compiler: a graph goes in, an artefact for one kind of device comes out.

    Compiling needs neither torch nor ModelOpt, so that it can happen on the device.
    """

    @property
    def backend(self) -> Backend:
        """Written into the manifest; `runtime.loading.load_engine` picks the runtime by it."""

    def compile(self, graph: Path, folder: Path, batch: BatchSizes, report: Report) -> Artefact:
        """Compile the ONNX file `graph` into `folder`; `report` takes lines of progress.

        Raises:
            CompileError: the graph is illegal for this backend, or the compiler failed.
        """

    def missing_device(self) -> str | None:
        """Why this machine cannot run what it compiles; None where it can."""


# Precision of what an INT8 graph does not quantise: most CPUs have no FP16 arithmetic, every GPU has.
INT8_REST: Final[dict[Backend, Rest]] = {"openvino": "fp32", "tensorrt": "fp16", "tensorrt-rtx": "fp16"}
