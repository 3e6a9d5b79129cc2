"""What a compiler for one kind of device offers, and which there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from server.manifest import Backend, BatchSizes, Compatibility

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
    """

    file: str
    backend_version: str
    compatibility: Compatibility
    batch: BatchSizes


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


# `module:class` by backend, imported only when asked for.
TARGETS: Final[dict[Backend, str]] = {"openvino": "builder.openvino:OpenVINOTarget"}

# Precision of what an INT8 graph does not quantise: most CPUs have no FP16 arithmetic, every GPU has.
INT8_REST: Final[dict[Backend, Rest]] = {"openvino": "fp32", "tensorrt": "fp16", "tensorrt-rtx": "fp16"}


def open_target(backend: Backend) -> Target:
    """The target for that backend.

    Raises:
        CompileError: its library is not installed here.
    """
    module, _, attribute = TARGETS[backend].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target
