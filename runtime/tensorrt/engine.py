"""TensorRT and TensorRT-RTX runtime: an engine package's `engine.plan` on this machine's GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runtime.cuda import Cuda, open_cuda
from runtime.engine import Options
from runtime.finite import check_finite
from runtime.manifest import BatchSizes, EngineError, Manifest, read_artefact
from runtime.tensorrt.compatibility import check_kind, check_machine, check_version, this_machine
from runtime.tensorrt.library import TensorRTBackend, TensorRTLibrary, errors_in, load_tensorrt
from runtime.tensorrt.slot import TensorRTSlot

if TYPE_CHECKING:
    import tensorrt as trt

DEFAULT_SLOTS: Final = 2  # one copies while the other computes


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
    with _attached(cuda):
        check_machine(folder, manifest, this_machine(cuda.device()))
        engine = _deserialise(folder, manifest, library, plan, host_code=options.host_code)
        profiles = _profiles(engine, manifest)
        _check_tensors(folder, manifest, library, engine, profiles)
    return TensorRTEngine(manifest, library, engine, profiles, cuda, options)


@contextmanager
def _attached(cuda: Cuda) -> Iterator[None]:
    cuda.attach_thread()
    try:
        yield
    finally:
        cuda.detach_thread()


def _deserialise(
    folder: Path, manifest: Manifest, library: TensorRTLibrary, plan: bytes, *, host_code: bool
) -> Any:
    trt = library.trt
    with library.log.capture() as lines:
        runtime = trt.Runtime(library.logger)
        runtime.engine_host_code_allowed = host_code
        if manifest.compatibility.dla_core is not None:
            runtime.DLA_core = manifest.compatibility.dla_core  # else core 0, whatever it was built for
        if hasattr(runtime, "get_engine_validity") and hasattr(trt, "EngineValidity"):
            validity, diagnostics = runtime.get_engine_validity(plan)
            if validity == trt.EngineValidity.INVALID:
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
        options: Options,
    ) -> None:
        self._manifest = manifest
        self._library = library
        self._engine: trt.ICudaEngine | None = engine
        self._profiles = profiles
        self._cuda = cuda
        self._options = options

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself."""
        return self._manifest

    @property
    def slots(self) -> int:
        """Two, unless told otherwise: one's copies overlap the other's computation."""
        return self._options.slots or DEFAULT_SLOTS

    @property
    def best_batch(self) -> int:
        """What was asked for, or all that it takes: kernels are launched once for a batch."""
        return self._options.batch or self._manifest.batch.max

    @property
    def run_sizes(self) -> Sequence[int]:
        """Every size within one of the profiles."""
        sizes = {size for profile in self._profiles for size in range(profile.min, profile.max + 1)}
        return sorted(sizes)

    @property
    def on_cpu(self) -> bool:
        """False: inference runs on the GPU and leaves the cores to decoding."""
        return False

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
            for size in self.run_sizes:
                check_finite(slot.infer(size))
        except BaseException:
            slot.close()
            raise
        return slot

    def close(self) -> None:
        """Free the engine; all slots must be closed."""
        with _attached(self._cuda):
            self._engine = None
