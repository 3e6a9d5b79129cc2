"""TensorRT and TensorRT-RTX as targets of `trimrt build`."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Final

from builder.compile.targets.base import Artefact, CompileError
from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.memory import MIB, default_workspace
from builder.compile.targets.tensorrt.options import TensorRTOptions
from builder.compile.targets.tensorrt.progress import BuildListener
from builder.compile.targets.tensorrt.timing_cache import (
    timing_cache_folder,
    timing_cache_path,
    usable_timing_cache,
)
from builder.kit import Report
from runtime.cuda import Cuda, CudaUnavailableError, Device, attached, open_cuda
from runtime.jetson import available_memory
from runtime.manifest import BatchSizes, Compatibility
from runtime.tensorrt.compatibility import this_machine
from runtime.tensorrt.library import TensorRTBackend, load_tensorrt

PLAN_NAME: Final = "engine.plan"
LOG_NAME: Final = "tensorrt.log"


class TensorRTTarget:
    """Compiles for the GPU at hand; with TensorRT-RTX, for any GPU from Ampere on, and without one."""

    def __init__(
        self, backend: TensorRTBackend, options: TensorRTOptions, listener: BuildListener | None = None
    ) -> None:
        """Import the library.

        Raises:
            EngineError: it is not installed here.
        """
        self.backend: TensorRTBackend = backend
        self._library = load_tensorrt(backend)
        self._options = options
        self._listener = listener
        self._without_cuda: str | None = None

    def compile(self, graph: Path, folder: Path, batch: BatchSizes, report: Report) -> Artefact:
        """Write `engine.plan` and TensorRT's messages to `folder`."""
        options = self._options
        if options.profiles:
            batch = _envelope(options.profiles)
        else:
            options = options.model_copy(update={"profiles": default_profiles(batch)})
        compatibility = self._compatibility()
        resources = BuildResources(
            workspace=self._workspace(),
            timing_cache=self._timing_cache(),
            log=folder / LOG_NAME,
            layers=folder,
            jetson=compatibility.board is not None,
        )
        report(f"compiling with {self.backend} {self._library.version}")
        try:
            plan = build_engine(self._library, graph, options, resources, self._listener)
        except CompileError as error:
            raise CompileError(f"{error}{_kept(folder / LOG_NAME)}") from error
        (folder / PLAN_NAME).write_bytes(plan)
        return Artefact(
            PLAN_NAME,
            self._library.version,
            compatibility,
            batch=batch,
            profiles=tuple(options.profiles),
        )

    def missing_device(self) -> str | None:
        """Why plans cannot be run here; None on a machine with a GPU."""
        return self._without_cuda if self._cuda is None else None

    @cached_property
    def _cuda(self) -> Cuda | None:
        try:
            return open_cuda()
        except CudaUnavailableError as error:
            self._without_cuda = str(error)
            return None

    @cached_property
    def _device(self) -> Device | None:
        if self._cuda is None:
            return None
        with attached(self._cuda):
            return self._cuda.device()

    def _compatibility(self) -> Compatibility:
        options, here = self._options, this_machine(self._device)
        capabilities = options.compute_capabilities
        if options.hardware_compatibility == "same-compute-capability" and here.compute_capability:
            capabilities = [here.compute_capability]
        return here.model_copy(
            update={
                "compute_capabilities": capabilities,
                "hardware_compatible": options.hardware_compatibility != "none",
                "version_compatible": options.version_compatible,
                "dla_core": options.dla_core,
            }
        )

    def _workspace(self) -> int:
        if self._options.workspace_mib is not None:
            return self._options.workspace_mib * MIB
        if self._cuda is None or self._device is None:
            return default_workspace(None, shared=False)
        with attached(self._cuda):
            free, _ = self._cuda.memory()
        if self._device.integrated:  # CUDA does not count the page cache, most of what is free
            return default_workspace(available_memory() or free, shared=True)
        return default_workspace(free, shared=False)

    def _timing_cache(self) -> Path | None:
        if self.backend == "tensorrt-rtx" or self._device is None:
            return None
        folder = timing_cache_folder()
        return folder and usable_timing_cache(timing_cache_path(folder, self._library.version, self._device))


def default_profiles(batch: BatchSizes) -> list[BatchSizes]:
    """One for a lone image, which then gets kernels tuned for one, and one for the larger batches."""
    if batch.min > 1 or batch.max == 1:
        return [batch]
    larger = BatchSizes(min=2, opt=max(2, batch.opt), max=batch.max)
    return [BatchSizes(min=1, opt=1, max=1), larger]


def _envelope(profiles: list[BatchSizes]) -> BatchSizes:
    """The batch sizes that all profiles together take; the first one's favourite."""
    return BatchSizes(
        min=min(sizes.min for sizes in profiles),
        opt=profiles[0].opt,
        max=max(sizes.max for sizes in profiles),
    )


def _kept(log: Path) -> str:
    """Save the log of a failed build, whose folder is about to be removed."""
    if not log.is_file():
        return ""
    handle, name = tempfile.mkstemp(prefix="trimrt-tensorrt-", suffix=".log")
    os.close(handle)
    shutil.copyfile(log, name)
    return f"\nTensorRT's messages are in {name}"
