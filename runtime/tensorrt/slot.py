"""One batch at a time through TensorRT: the thread that opens a slot owns all of its CUDA objects.

For 1, 2, 4, 8, ... images there is an execution context of its own, whose shape and addresses are set once,
and, where CUDA graphs can be captured, the graph of its work. Other batches run in the next larger one, whose
last rows are then of no meaning. The contexts share one block of
scratch memory, since a slot runs one at a time. So a graph never meets another shape or address
than those it was captured with; NVIDIA recommends one context for each captured graph.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.cuda import Cuda, CudaError, DeviceLostError, HostBuffer
from runtime.engine import Outputs
from runtime.manifest import BatchSizes, EngineError, Manifest
from runtime.tensorrt.library import TensorRTLibrary, errors_in

if TYPE_CHECKING:
    import tensorrt as trt

STAGES: Final = ("h2d", "compute", "d2h")
MIB: Final = 1 << 20

logger = logging.getLogger("trimrt.tensorrt")


@dataclass
class _Buffer:
    """A tensor's memory: the host's side, and the address that TensorRT is given."""

    host: HostBuffer
    address: int
    copied: bool  # False where the GPU works in the host's memory


@dataclass
class _Execution:
    """What runs one batch size."""

    context: trt.IExecutionContext
    size: int
    graph: Any = None


def sizes_of(profile: BatchSizes) -> list[int]:
    """The batch sizes that get an execution context: powers of two, and the largest."""
    powers = (1 << exponent for exponent in range(profile.max.bit_length()))
    return sorted({profile.max, *(size for size in powers if size >= profile.min)})


def _places(profiles: list[BatchSizes]) -> dict[int, tuple[int, int]]:
    """For each batch that the profiles take: the first profile that does, and the context's size."""
    places: dict[int, tuple[int, int]] = {}
    for index, profile in enumerate(profiles):
        sizes = sizes_of(profile)
        for count in range(profile.min, profile.max + 1):
            places.setdefault(count, (index, next(size for size in sizes if size >= count)))
    return places


class TensorRTSlot:
    """Execution contexts, stream and buffers on one thread."""

    def __init__(
        self,
        manifest: Manifest,
        library: TensorRTLibrary,
        engine: trt.ICudaEngine,
        profiles: list[BatchSizes],
        cuda: Cuda,
        *,
        graphs: bool,
    ) -> None:
        """Allocate everything but the contexts, on the calling thread.

        Args:
            manifest: of the engine's package.
            library: the TensorRT that deserialised it.
            engine: shared by all slots.
            profiles: batch sizes of the engine's optimisation profiles, in their order.
            cuda: shared by all slots; this one attaches the calling thread.
            graphs: use CUDA graphs where they can be captured.

        Raises:
            EngineError: no memory, or CUDA failed.
        """
        self._manifest = manifest
        self._library = library
        self._engine: trt.ICudaEngine = engine
        self._profiles = profiles
        self._places = _places(profiles)
        self._cuda = cuda
        self._capturing = graphs and library.backend == "tensorrt" and cuda.captures_graphs
        self._native_graphs = graphs
        self._executions: dict[int, _Execution] = {}
        self._resources = ExitStack()
        try:
            self._allocate()
        except BaseException:
            self._resources.close()
            raise

    def _allocate(self) -> None:
        cuda, resources = self._cuda, self._resources
        cuda.attach_thread()
        resources.callback(cuda.detach_thread)
        self._stream = cuda.create_stream()
        resources.callback(cuda.destroy_stream, self._stream)
        self._events = [self._event() for _ in range(len(STAGES) + 1)]
        self._scratch_size = max(int(self._engine.device_memory_size_v2), 1)
        self._scratch = cuda.allocate(self._scratch_size)
        resources.callback(cuda.free, self._scratch)

        mapped = cuda.device().integrated
        limit, classes = self._manifest.batch.max, len(self._manifest.labels)
        self._input = self._buffer((limit, *self._manifest.input.shape[1:]), np.uint8, mapped)
        self._outputs = [self._buffer((limit, classes), np.float32, mapped) for _ in self._manifest.outputs]
        resources.callback(self._executions.clear)  # contexts go before the memory they use
        resources.callback(self._discard_graphs)

        free, total = cuda.memory()
        logger.info(
            "%s: a slot takes %.1f MiB of device memory; %.0f of %.0f MiB are free",
            self._manifest.name,
            self.device_bytes / MIB,
            free / MIB,
            total / MIB,
        )

    def _event(self) -> Any:
        event = self._cuda.create_event()
        self._resources.callback(self._cuda.destroy_event, event)
        return event

    def _buffer(self, shape: tuple[int, ...], dtype: type[np.generic], mapped: bool) -> _Buffer:
        host = self._cuda.allocate_host(shape, dtype, mapped=mapped)
        self._resources.callback(self._cuda.free_host, host)
        if host.device_address is not None:
            return _Buffer(host, host.device_address, copied=False)
        address = self._cuda.allocate(host.array.nbytes)
        self._resources.callback(self._cuda.free, address)
        return _Buffer(host, address, copied=True)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Page-locked `uint8` NHWC of shape `(batch.max, height, width, 3)`, to be filled before `infer`."""
        return self._input.host.array

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory for scratch and tensors."""
        buffers = [self._input, *self._outputs]
        return self._scratch_size + sum(buffer.host.array.nbytes for buffer in buffers if buffer.copied)

    def infer(self, count: int, *, alone: bool = False) -> Outputs:
        """Run the first `count` images of `pixels`; a GPU makes no difference of `alone`.

        Raises:
            ValueError: `count` is in none of the engine's profiles.
            EngineError: TensorRT or CUDA failed; the next call starts afresh.
            DeviceLostError: and all later ones will.
        """
        if count not in self._places:
            ranges = ", ".join(f"{profile.min}..{profile.max}" for profile in self._profiles)
            raise ValueError(f"batch of {count} is outside {ranges}")
        profile, size = self._places[count]
        try:
            execution = self._executions.get(size) or self._prepare(profile, size)
            self._run(execution, count)
        except EngineError:
            self._recover()
            raise
        logits, probabilities = (buffer.host.array[:count] for buffer in self._outputs)
        timings = {
            stage: self._cuda.elapsed_ms(start, end)
            for stage, start, end in zip(STAGES, self._events[:-1], self._events[1:], strict=True)
        }
        return Outputs(logits, probabilities, timings)

    def report_layers(self, count: int, profiler: trt.IProfiler) -> None:
        """Let TensorRT tell `profiler` the time of each layer, after every batch of that size."""
        _, size = self._places[count]
        context: trt.IExecutionContext = self._executions[size].context
        context.profiler = profiler

    def _run(self, execution: _Execution, count: int) -> None:
        cuda, stream = self._cuda, self._stream
        begin, copied_in, computed, copied_out = self._events
        cuda.record(begin, stream)
        if self._input.copied:
            cuda.copy_to_device(self._input.address, self._input.host.array[:count], stream)
        cuda.record(copied_in, stream)
        if execution.graph is None:
            self._enqueue(execution)
        else:
            cuda.launch(execution.graph, stream)
        cuda.record(computed, stream)
        for buffer in self._outputs:
            if buffer.copied:
                cuda.copy_to_host(buffer.host.array[:count], buffer.address, stream)
        cuda.record(copied_out, stream)
        cuda.wait(copied_out)
        if execution.graph is None and self._capturing:
            self._capture(execution)

    def _enqueue(self, execution: _Execution) -> None:
        context: trt.IExecutionContext = execution.context
        with self._library.log.capture() as lines:
            if not context.execute_async_v3(self._stream):
                raise EngineError(
                    f"TensorRT refused a batch of {execution.size}: {errors_in(lines) or 'no reason given'}"
                )

    def _capture(self, execution: _Execution) -> None:
        """Capture the work of a batch size that has just run, as TensorRT wants it."""
        try:
            execution.graph = self._cuda.capture(self._stream, lambda: self._enqueue(execution))
        except EngineError as error:  # the batch itself has its result, so go on without graphs
            self._capturing = False
            logger.warning("running without CUDA graphs, they cannot be captured here: %s", error)

    def _prepare(self, profile: int, size: int) -> _Execution:
        """A context with the shape and addresses of a batch size."""
        with self._library.log.capture() as lines:
            context: trt.IExecutionContext = self._create_context()
            if context is None:
                raise EngineError(f"TensorRT made no execution context: {errors_in(lines)}")
            done = profile == 0 or context.set_optimization_profile_async(profile, self._stream)
            self._cuda.synchronize(self._stream)
            context.set_device_memory(self._scratch, self._scratch_size)
            name, (_, *image) = self._manifest.input.name, self._manifest.input.shape
            done = done and context.set_input_shape(name, (size, *image))
            done = done and context.set_tensor_address(name, self._input.address)
            for tensor, buffer in zip(self._manifest.outputs, self._outputs, strict=True):
                done = done and context.set_tensor_address(tensor.name, buffer.address)
            if not done or context.infer_shapes():
                raise EngineError(f"TensorRT does not take a batch of {size}: {errors_in(lines)}")
        self._executions[size] = _Execution(context, size)
        return self._executions[size]

    def _create_context(self) -> Any:
        trt, engine = self._library.trt, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        # TensorRT-RTX compiles kernels as it runs and so captures graphs itself, at moments it knows.
        if (
            self._native_graphs
            and hasattr(trt, "CudaGraphStrategy")
            and hasattr(engine, "create_runtime_config")
        ):
            config = engine.create_runtime_config()
            if hasattr(config, "cuda_graph_strategy"):
                config.set_execution_context_allocation_strategy(strategy)
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                return engine.create_execution_context(config)
        return engine.create_execution_context(strategy)

    def _recover(self) -> None:
        """Drop state that a failure may have left incomplete; the next batch sets everything up again.

        Raises:
            DeviceLostError: there will be none.
        """
        try:
            self._cuda.synchronize(self._stream)  # nothing may still read `pixels`
            self._discard_graphs()
        except DeviceLostError:
            raise
        except CudaError as error:
            logger.error("after a failed batch: %s", error)
        finally:
            self._executions.clear()

    def _discard_graphs(self) -> None:
        for execution in self._executions.values():
            graph, execution.graph = execution.graph, None
            if graph is not None:
                self._cuda.destroy_graph(graph)

    def close(self) -> None:
        """Free everything, on the thread that opened the slot."""
        try:
            self._resources.close()
        except CudaError as error:  # of a GPU that is gone; the end of the process frees what is left
            logger.error("while a slot was closed: %s", error)
