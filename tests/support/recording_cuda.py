"""Stand-ins for a GPU, where there is none: they keep a record and behave as CUDA documents it.

`RecordingCuda` implements our own CUDA interface over ordinary memory. Work that is put into a
stream happens when the stream is synchronised, on the memory as it is then; a graph replays the
work that was captured, with the addresses of that time. Calls from a thread that is not attached,
or that does not own the stream, fail as CUDA fails. `RecordingContext`, `RecordingEngine` and
`RecordingRuntime` have the names of TensorRT's classes (a test compares them); enums are
TensorRT's own. The network they "run" has logits that depend on every pixel of one image.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.cuda import CudaError, Device, DeviceLostError, HostBuffer

Work = Callable[[], None]

# As CUDA describes them: every Jetson Orin's GPU is called `Orin`.
ORIN = Device(
    name="Orin",
    compute_capability="8.7",
    integrated=True,
    cuda="12.6",
    multiprocessors=8,
    memory=7802676 * 1024,
)
AGX_ORIN = replace(ORIN, multiprocessors=16, memory=64349216 * 1024)
DESKTOP = Device(
    name="NVIDIA GeForce RTX 3060",
    compute_capability="8.6",
    integrated=False,
    cuda="13.0",
    multiprocessors=28,
    memory=12 << 30,
)


def logits_of(pixels: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
    """What the stand-in network computes, image by image."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64)
    weights = np.cos(np.outer(np.arange(flat.shape[1]), np.arange(1, classes + 1)))
    return (flat @ weights / flat.shape[1]).astype(np.float32)


def probabilities_of(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclass
class Call:
    name: str
    arguments: tuple[Any, ...]
    thread: int


@dataclass
class _Stream:
    owner: int
    queue: list[Work] = field(default_factory=list)
    capture: list[Work] | None = None

    def add(self, work: Work) -> None:
        (self.queue if self.capture is None else self.capture).append(work)


class RecordingCuda:
    """Our CUDA interface over ordinary memory."""

    name = "cuda-bindings"

    def __init__(self, device: Device = DESKTOP, *, captures_graphs: bool = True) -> None:
        self.captures_graphs = captures_graphs
        self.calls: list[Call] = []
        self.fail: dict[str, Callable[[], bool]] = {}  # name: should this call fail?
        self.lost = False  # for good: no call succeeds
        self.memory_at: dict[int, NDArray[np.uint8]] = {}
        self.host_buffers: dict[int, HostBuffer] = {}
        self.streams: dict[int, _Stream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, float] = {}
        self.recorded_in: dict[Any, int] = {}
        self.attached: Counter[int] = Counter()
        self._device = device
        self._lock = threading.RLock()
        self._next = 0x1000
        self._clock = 0.0

    def _called(self, name: str, *arguments: Any, attached: bool = True) -> None:
        with self._lock:
            thread = threading.get_ident()
            self.calls.append(Call(name, arguments, thread))
            if attached and not self.attached[thread]:
                raise CudaError(f"{name}: cudaErrorDeviceUninitialized: invalid device context")
            if self.lost:
                raise DeviceLostError(f"{name}: cudaErrorIllegalAddress: an illegal memory access")
            if name in self.fail and self.fail[name]():
                raise CudaError(f"{name}: cudaErrorUnknown: as the test asked")

    def names(self, *wanted: str) -> list[str]:
        """The calls made so far, or those of them that are wanted."""
        return [call.name for call in self.calls if not wanted or call.name in wanted]

    def new_id(self) -> int:
        with self._lock:
            self._next += 0x1000
            return self._next

    def in_use(self) -> int:
        """Everything that was made and not freed."""
        return sum(map(len, (self.memory_at, self.host_buffers, self.streams, self.graphs, self.events)))

    def stream(self, stream: int) -> _Stream:
        found = self.streams[stream]
        if found.owner != threading.get_ident():
            raise AssertionError("a stream was used by a thread that does not own it")
        return found

    # The interface

    def attach_thread(self) -> None:
        self._called("attach_thread", attached=False)
        self.attached[threading.get_ident()] += 1

    def detach_thread(self) -> None:
        self._called("detach_thread")
        self.attached[threading.get_ident()] -= 1

    def device(self) -> Device:
        self._called("device")
        return self._device

    def memory(self) -> tuple[int, int]:
        self._called("memory")
        return 4 << 30, 8 << 30

    def allocate(self, size: int) -> int:
        self._called("allocate", size)
        address = self.new_id() << 20
        self.memory_at[address] = np.full(size, 0xCD, np.uint8)
        return address

    def free(self, address: int) -> None:
        self._called("free", address)
        del self.memory_at[address]

    def allocate_host(self, shape: tuple[int, ...], dtype: DTypeLike, *, mapped: bool) -> HostBuffer:
        self._called("allocate_host", shape, mapped)
        array = np.zeros(shape, dtype)
        address = None
        if mapped:
            address = self.new_id() << 20
            self.memory_at[address] = array.reshape(-1).view(np.uint8)
        buffer = HostBuffer(array, address)
        self.host_buffers[id(array)] = buffer
        return buffer

    def free_host(self, buffer: HostBuffer) -> None:
        self._called("free_host")
        del self.host_buffers[id(buffer.array)]
        if buffer.device_address is not None:
            del self.memory_at[buffer.device_address]

    def create_stream(self) -> int:
        self._called("create_stream")
        stream = self.new_id()
        self.streams[stream] = _Stream(threading.get_ident())
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._called("destroy_stream")
        self.stream(stream)
        del self.streams[stream]

    def synchronize(self, stream: int) -> None:
        self._called("synchronize")
        queue = self.stream(stream).queue
        while queue:
            queue.pop(0)()

    def copy_to_device(self, address: int, source: NDArray[Any], stream: int) -> None:
        self._called("copy_to_device", source.nbytes)
        target = self.memory_at[address][: source.nbytes]
        self.stream(stream).add(lambda: np.copyto(target, source.reshape(-1).view(np.uint8)))

    def copy_to_host(self, target: NDArray[Any], address: int, stream: int) -> None:
        self._called("copy_to_host", target.nbytes)
        source = self.memory_at[address][: target.nbytes]
        self.stream(stream).add(lambda: np.copyto(target.reshape(-1).view(np.uint8), source))

    def create_event(self) -> Any:
        self._called("create_event")
        event = self.new_id()
        self.events[event] = float("nan")
        return event

    def destroy_event(self, event: Any) -> None:
        self._called("destroy_event")
        del self.events[event]

    def record(self, event: Any, stream: int) -> None:
        self._called("record")
        self.recorded_in[event] = stream

        def happen() -> None:
            self._clock += 1.5
            self.events[event] = self._clock

        self.stream(stream).add(happen)

    def wait(self, event: Any) -> None:
        self._called("wait")
        queue = self.stream(self.recorded_in[event]).queue
        while queue:
            queue.pop(0)()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        self._called("elapsed_ms")
        return self.events[end] - self.events[start]

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        self._called("capture")
        captured: list[Work] = []
        self.stream(stream).capture = captured
        try:
            enqueue()
        finally:
            self.stream(stream).capture = None
        graph = self.new_id()
        self.graphs[graph] = captured
        return graph

    def launch(self, graph: Any, stream: int) -> None:
        self._called("launch")
        work = list(self.graphs[graph])
        self.stream(stream).queue.extend(work)

    def destroy_graph(self, graph: Any) -> None:
        self._called("destroy_graph")
        del self.graphs[graph]


class RecordingContext:
    """An execution context; the network it runs is `logits_of`."""

    def __init__(self, engine: RecordingEngine) -> None:
        self._engine = engine
        self._cuda = engine.recorded.cuda
        self._addresses: dict[str, int] = {}
        self._profile = 0
        self._count = 0
        self._scratch: tuple[int, int] | None = None
        self.profiler: Any = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._cuda._called("set_optimization_profile_async", profile_index)
        self._profile = profile_index
        return profile_index < self._engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._count = shape[0]
        return low[0] <= shape[0] <= high[0] and tuple(shape[1:]) == tuple(low[1:])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in {"images", "logits", "probabilities"}

    def infer_shapes(self) -> list[str]:
        return [] if self._count else ["images"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._cuda._called("execute_async_v3", self._count)
        recorded = self._engine.recorded
        if recorded.refuse():
            recorded.log.write("ERROR", "IExecutionContext::enqueueV3: as the test asked")
            return False
        assert self._scratch is not None, "enqueued without scratch memory"
        assert self._scratch[0] in self._cuda.memory_at
        assert self._scratch[1] >= self._engine.device_memory_size_v2
        count, memory = self._count, {name: self._cuda.memory_at[at] for name, at in self._addresses.items()}
        size, classes = recorded.image_size, recorded.classes

        def compute() -> None:
            pixels = memory["images"][: count * size * size * 3].reshape(count, size, size, 3)
            logits = logits_of(pixels, classes)
            for name, values in (("logits", logits), ("probabilities", probabilities_of(logits))):
                memory[name][: values.nbytes] = values.reshape(-1).view(np.uint8)

        self._cuda.stream(stream_handle).add(compute)
        if self.profiler is not None:
            for name, milliseconds in (("first", 0.5), ("second", 0.25)):
                self.profiler.report_layer_time(name, milliseconds)
        return True


class RecordingEngine:
    """A deserialised engine of a classifier that takes pixels."""

    device_memory_size_v2 = 4096
    num_io_tensors = 3

    def __init__(self, recorded: RecordingTensorRT) -> None:
        self.recorded = recorded
        self.num_optimization_profiles = len(recorded.profiles)

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits", "probabilities")[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.recorded.real.TensorIOMode
        return modes.INPUT if name == "images" else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = self.recorded.real.DataType
        return kinds.UINT8 if name == "images" else kinds.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        size = self.recorded.image_size
        return (-1, size, size, 3) if name == "images" else (-1, self.recorded.classes)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(batch, *self.get_tensor_shape(name)[1:]) for batch in self.recorded.profiles[profile_index]]

    def create_execution_context(self, strategy: Any) -> RecordingContext:
        assert strategy == self.recorded.real.ExecutionContextAllocationStrategy.USER_MANAGED
        self.recorded.contexts += 1
        return RecordingContext(self)


class RecordingRuntime:
    """A runtime that notes what it was told before it deserialises."""

    def __init__(self, recorded: RecordingTensorRT) -> None:
        self._recorded = recorded
        self.engine_host_code_allowed = False
        self.DLA_core = -1

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> RecordingEngine | None:
        self._recorded.deserialised.append((serialized_engine, self.engine_host_code_allowed, self.DLA_core))
        if self._recorded.unreadable:
            self._recorded.log.write("ERROR", "IRuntime::deserializeCudaEngine: as the test asked")
            return None
        return RecordingEngine(self._recorded)


class RecordingTensorRT:
    """The module: TensorRT's own enums, and a runtime that works without a GPU."""

    def __init__(self, real: Any, cuda: RecordingCuda, log: Any) -> None:
        self.real = real
        self.cuda = cuda
        self.log = log
        self.profiles = [(1, 4, 8)]
        self.image_size = 6
        self.classes = 10
        self.contexts = 0
        self.unreadable = False
        self.refuse: Callable[[], bool] = lambda: False
        self.deserialised: list[tuple[bytes, bool, int]] = []
        self.DataType = real.DataType
        self.IProfiler = real.IProfiler
        self.TensorIOMode = real.TensorIOMode
        self.ExecutionContextAllocationStrategy = real.ExecutionContextAllocationStrategy

    def Runtime(self, logger: Any) -> RecordingRuntime:  # noqa: N802  # TensorRT's name
        return RecordingRuntime(self)
