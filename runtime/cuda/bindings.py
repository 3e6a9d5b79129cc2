"""CUDA by NVIDIA's `cuda-bindings`, the runtime API."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from cuda.bindings import runtime
from numpy.typing import DTypeLike, NDArray

from runtime.cuda import (
    CudaError,
    CudaName,
    CudaUnavailableError,
    Device,
    DeviceLostError,
    HostBuffer,
    version_text,
)
from runtime.cuda.nodes import advice

# After these, says CUDA's documentation, only a new process can use the GPU. Older versions lack the last.
LASTING: Final = frozenset(
    (
        *("cudaErrorIllegalAddress", "cudaErrorMisalignedAddress", "cudaErrorInvalidAddressSpace"),
        *("cudaErrorIllegalInstruction", "cudaErrorInvalidPc", "cudaErrorHardwareStackError"),
        *("cudaErrorLaunchFailure", "cudaErrorLaunchTimeout", "cudaErrorAssert"),
        *("cudaErrorECCUncorrectable", "cudaErrorNvlinkUncorrectable", "cudaErrorContextIsDestroyed"),
        *("cudaErrorMpsClientTerminated", "cudaErrorExternalDevice", "cudaErrorContained"),
        *("cudaErrorTensorMemoryLeak",),
    )
)


class BindingsCuda:
    """One device through `cuda.bindings.runtime`."""

    name: Final[CudaName] = "cuda-bindings"
    captures_graphs: Final = True

    def __init__(self, index: int = 0) -> None:
        """Use the device with that index.

        Raises:
            CudaUnavailableError: no driver, or no such device.
        """
        self._index = index
        try:
            count = _call(runtime.cudaGetDeviceCount)
        except CudaError as error:
            raise CudaUnavailableError(
                f"no usable NVIDIA GPU: {error}. Is there a driver, and is it new enough for cuda-bindings "
                f"{version('cuda-bindings')}? (JetPack 6: pip install 'cuda-bindings>=12.8,<13'){advice()}"
            ) from error
        if index >= count:
            raise CudaUnavailableError(f"there is no GPU {index}; this machine has {count}")

    def attach_thread(self) -> None:
        """Choose the device for the calling thread; the runtime API uses its primary context."""
        _call(runtime.cudaSetDevice, self._index)

    def detach_thread(self) -> None:
        """Nothing to do: the runtime API keeps no stack of contexts."""

    def device(self) -> Device:
        """What the device is."""
        properties = _call(runtime.cudaGetDeviceProperties, self._index)
        return Device(
            name=properties.name.decode().rstrip("\0"),
            compute_capability=f"{properties.major}.{properties.minor}",
            integrated=bool(properties.integrated),
            cuda=version_text(_call(runtime.cudaDriverGetVersion)),
            multiprocessors=int(properties.multiProcessorCount),
            memory=int(properties.totalGlobalMem),
        )

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""
        free, total = _call(runtime.cudaMemGetInfo)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory."""
        return int(_call(runtime.cudaMalloc, size))

    def free(self, address: int) -> None:
        """Give device memory back."""
        _call(runtime.cudaFree, address)

    def allocate_host(self, shape: tuple[int, ...], dtype: DTypeLike, *, mapped: bool) -> HostBuffer:
        """A page-locked array, at its device address too if `mapped`."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        flags = runtime.cudaHostAllocMapped if mapped else runtime.cudaHostAllocDefault
        address = int(_call(runtime.cudaHostAlloc, size, flags))
        memory = memoryview((ctypes.c_uint8 * size).from_address(address))
        array = np.frombuffer(memory, np.dtype(dtype)).reshape(shape)
        return HostBuffer(array, int(_call(runtime.cudaHostGetDevicePointer, address, 0)) if mapped else None)

    def free_host(self, buffer: HostBuffer) -> None:
        """Give page-locked memory back."""
        _call(runtime.cudaFreeHost, buffer.array.ctypes.data)

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        return int(_call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        _call(runtime.cudaStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all of a stream's work; other Python threads run meanwhile."""
        _call(runtime.cudaStreamSynchronize, stream)

    def copy_to_device(self, address: int, source: NDArray[Any], stream: int) -> None:
        """Enqueue a copy from page-locked memory."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        _call(runtime.cudaMemcpyAsync, address, source.ctypes.data, source.nbytes, kind, stream)

    def copy_to_host(self, target: NDArray[Any], address: int, stream: int) -> None:
        """Enqueue a copy to page-locked memory."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call(runtime.cudaMemcpyAsync, target.ctypes.data, address, target.nbytes, kind, stream)

    def create_event(self) -> Any:
        """An event that takes the time, and can be waited for."""
        return _call(runtime.cudaEventCreateWithFlags, runtime.cudaEventBlockingSync)

    def destroy_event(self, event: Any) -> None:
        """Destroy an event."""
        _call(runtime.cudaEventDestroy, event)

    def record(self, event: Any, stream: int) -> None:
        """Enqueue an event."""
        _call(runtime.cudaEventRecord, event, stream)

    def wait(self, event: Any) -> None:
        """Sleep until an event has happened; other Python threads run meanwhile."""
        _call(runtime.cudaEventSynchronize, event)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""
        return float(_call(runtime.cudaEventElapsedTime, start, end))

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """An executable graph of what `enqueue` puts into the stream, without running it."""
        # Thread-local, or an allocation in any other thread would break the capture.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(runtime.cudaStreamBeginCapture, stream, mode)
        try:
            enqueue()
        except BaseException:
            self._abandon_capture(stream)
            raise
        graph = _call(runtime.cudaStreamEndCapture, stream)
        try:
            return _call(runtime.cudaGraphInstantiate, graph, 0)
        finally:
            _call(runtime.cudaGraphDestroy, graph)

    def _abandon_capture(self, stream: int) -> None:
        """Leave capture mode; the capture may have been invalidated, so errors are expected here."""
        error, graph = runtime.cudaStreamEndCapture(stream)
        if error == runtime.cudaError_t.cudaSuccess and int(graph):
            runtime.cudaGraphDestroy(graph)
        runtime.cudaGetLastError()  # or the next call would report this one's error

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a graph."""
        _call(runtime.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph."""
        _call(runtime.cudaGraphExecDestroy, graph)


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """What a runtime function returns beside its status: nothing, a value, or a tuple.

    Raises:
        CudaError: the status is not success.
        DeviceLostError: nor will it be that of any later call.
    """
    status, *values = function(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(status)
        kind = DeviceLostError if status.name in LASTING else CudaError
        raise kind(f"{function.__name__}: {status.name}: {text.decode()}")
    return values[0] if len(values) == 1 else tuple(values)
