"""TensorRT and TensorRT-RTX runtime: an engine package's `engine.plan` on this machine's GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runtime.cuda import Cuda, CudaError, Device, attached, open_cuda
from runtime.engine import Options
from runtime.finite import check_finite
from runtime.manifest import BatchSizes, EngineError, Manifest, read_artefact
from runtime.tensorrt.compatibility import check_kind, check_machine, check_version, this_machine
from runtime.tensorrt.library import TensorRTBackend, TensorRTLibrary, errors_in, load_tensorrt
from runtime.tensorrt.slot import TensorRTSlot, sizes_of

if TYPE_CHECKING:
    import tensorrt as trt

MIB: Final = 1 << 20

logger = logging.getLogger("trimrt.tensorrt")


def load(folder: Path, manifest: Manifest, options: Options) -> TensorRTEngine:
    """Check that the package fits this machine, then deserialise its plan.

    Raises:
        EngineError: no TensorRT or GPU here; built by another version, for another GPU or by another
            library; damaged; or refused by TensorRT.
    """
    backend: TensorRTBackend = "tensorrt-rtx" if manifest.backend == "tensorrt-rtx" else "tensorrt"
    library = load_tensorrt(backend)
    check_version(folder, manifest, library, host_code=options.host_code)
    plan = read_artefact(folder, manifest)
    check_kind(folder, manifest, plan)
    cuda = open_cuda(options.cuda)
    with attached(cuda):
        device = cuda.device()
        check_machine(folder, manifest, this_machine(device))
        engine = _deserialise(folder, manifest, library, plan, host_code=options.host_code)
        profiles = _profiles(engine, manifest)
        _check_tensors(folder, manifest, library, engine, profiles)
    return TensorRTEngine(manifest, library, engine, profiles, cuda, device, options)


def _deserialise(
    folder: Path, manifest: Manifest, library: TensorRTLibrary, plan: bytes, *, host_code: bool
) -> Any:
    with library.log.capture() as lines:
        runtime: trt.Runtime | None = library.runtime()
        if runtime is None:
            reason = errors_in(lines) or "it gave no reason"
            raise EngineError(f"{library.backend} {library.version} does not start: {reason}")
        runtime.engine_host_code_allowed = host_code
        if manifest.compatibility.dla_core is not None:
            runtime.DLA_core = manifest.compatibility.dla_core  # else core 0, whatever it was built for
        if hasattr(runtime, "get_engine_validity") and hasattr(library.trt, "EngineValidity"):
            validity, diagnostics = runtime.get_engine_validity(plan)
            if validity == library.trt.EngineValidity.INVALID:
                raise EngineError(
                    f"{folder}: {library.backend} {library.version} finds the plan invalid (diagnostics "
                    f"{diagnostics}) {errors_in(lines)}; rebuild it: {manifest.build_command}"
                )
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{library.backend} {library.version} cannot load {folder}; "
            f"rebuild it: {manifest.build_command}\n{errors_in(lines)}"
        )
    return engine


def _profiles(engine: trt.ICudaEngine, manifest: Manifest) -> list[BatchSizes]:
    """Batch sizes of the engine's optimisation profiles."""
    name = manifest.input.name
    fixed = engine.get_tensor_shape(name)[0]
    if fixed >= 0:
        return [BatchSizes(min=fixed, opt=fixed, max=fixed)]
    profiles = []
    for index in range(engine.num_optimization_profiles):
        low, best, high = engine.get_tensor_profile_shape(name, index)
        profiles.append(BatchSizes(min=low[0], opt=best[0], max=high[0]))
    return profiles


def _check_tensors(
    folder: Path,
    manifest: Manifest,
    library: TensorRTLibrary,
    engine: trt.ICudaEngine,
    profiles: list[BatchSizes],
) -> None:
    """Refuse an engine whose tensors are not the manifest's: buffers are sized by the manifest."""
    trt = library.trt
    names = {trt.DataType.UINT8: "uint8", trt.DataType.FLOAT: "float32"}
    found = set()
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        way = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        dtype = names.get(engine.get_tensor_dtype(name), "another type")
        found.add((way, name, dtype, tuple(engine.get_tensor_shape(name))[1:]))
    said = {("input", manifest.input.name, manifest.input.dtype, tuple(manifest.input.shape[1:]))}
    said |= {("output", tensor.name, tensor.dtype, tuple(tensor.shape[1:])) for tensor in manifest.outputs}
    sizes = (min(profile.min for profile in profiles), max(profile.max for profile in profiles))
    if found != said or sizes != (manifest.batch.min, manifest.batch.max):
        raise EngineError(
            f"{folder}: the plan's tensors {sorted(found)} with batches {sizes[0]}..{sizes[1]} are not the "
            f"manifest's {sorted(said)} with {manifest.batch.min}..{manifest.batch.max}; "
            f"rebuild it: {manifest.build_command}"
        )


class TensorRTEngine:
    """A deserialised plan; each slot has its own execution contexts."""

    def __init__(
        self,
        manifest: Manifest,
        library: TensorRTLibrary,
        engine: trt.ICudaEngine,
        profiles: list[BatchSizes],
        cuda: Cuda,
        device: Device,
        options: Options,
    ) -> None:
        self._manifest = manifest
        self._library = library
        self._engine: trt.ICudaEngine | None = engine
        self._profiles = profiles
        self._cuda = cuda
        self._copies = not device.integrated
        self._options = options

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself."""
        return self._manifest

    @property
    def trt(self) -> Any:
        """The module that deserialised it."""
        return self._library.trt

    @property
    def slots(self) -> int:
        """What was asked for, or two, so that one's copies overlap the other's computation.

        One, where the GPU works in the host's memory and nothing is copied.
        """
        return self._options.slots or (2 if self._copies else 1)

    @property
    def best_batch(self) -> int:
        """What was asked for, or all that it takes: kernels are launched once for a batch."""
        return self._options.batch or self._manifest.batch.max

    @property
    def run_sizes(self) -> Sequence[int]:
        """Powers of two within the profiles, and their largest: each size's context and graph take memory."""
        return sorted({size for profile in self._profiles for size in sizes_of(profile)})

    @property
    def on_cpu(self) -> bool:
        """False: inference runs on the GPU and leaves the cores to decoding."""
        return False

    @property
    def alone_s(self) -> float:
        """Infinite: a batch waits for the GPU."""
        return math.inf

    def open_slot(self) -> TensorRTSlot:
        """A warm slot owned by the calling thread, which alone may use and close it.

        TensorRT sets up an execution context and a CUDA graph for each batch size when it first runs.

        Raises:
            EngineError: no memory for it, its first batches failed, or the engine is closed.
        """
        if self._engine is None:
            raise EngineError(f"{self._manifest.name} is closed")
        slot = TensorRTSlot(
            self._manifest,
            self._library,
            self._engine,
            self._profiles,
            self._cuda,
            graphs=self._options.cuda_graphs,
        )
        try:
            self._warm_up(slot)
        except BaseException:
            slot.close()
            raise
        return slot

    def _warm_up(self, slot: TensorRTSlot) -> None:
        """Run every size once, and log what that took."""
        taken, (before, _) = [], self._cuda.memory()
        for size in self.run_sizes:
            check_finite(slot.infer(size))
            free, _ = self._cuda.memory()
            taken.append(f"{(before - free) / MIB:.1f} for {size}")
            before = free
        logger.info(
            "%s: MiB of device memory that the context and graph of each batch size took: %s",
            self._manifest.name,
            ", ".join(taken),
        )

    def close(self) -> None:
        """Free the engine; all slots must be closed."""
        try:
            with attached(self._cuda):
                self._engine = None
        except CudaError as error:  # of a GPU that is gone; the end of the process frees what is left
            logger.error("while %s was closed: %s", self._manifest.name, error)
