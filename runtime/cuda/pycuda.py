"""CUDA by PyCUDA, the driver API; without graph capture, which PyCUDA does not have.

TensorRT works in the device's *primary* context. `pycuda.autoinit` would create another one, whose
streams and addresses are invalid there, and only in the importing thread. So the primary context is
retained here, and pushed by each thread that owns CUDA objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pycuda import driver

from runtime.cuda import CudaError, CudaName, CudaUnavailableError, Device, HostBuffer, version_text
from runtime.cuda.nodes import advice


class PycudaCuda:
    """One device through `pycuda.driver`."""

    name: Final[CudaName] = "pycuda"
    captures_graphs: Final = False

    def __init__(self, index: int = 0) -> None:
        """Retain the primary context of the device with that index.

        Raises:
            CudaUnavailableError: no driver, or no such device.
        """
        try:
            driver.init()
            self._device = driver.Device(index)
            self._context = self._device.retain_primary_context()
        except driver.Error as error:
            raise CudaUnavailableError(f"no usable NVIDIA GPU: {error}.{advice()}") from error
        # PyCUDA frees objects without references, so those handed out as numbers are kept here.
        self._allocations: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    def attach_thread(self) -> None:
        """Push the primary context; once a thread."""
        _call(self._context.push)

    def detach_thread(self) -> None:
        """Pop it: PyCUDA aborts the process at exit over a context that was left on the stack."""
        _call(driver.Context.pop)

    def device(self) -> Device:
        """What the device is."""
        major, minor = _call(self._device.compute_capability)
        return Device(
            name=_call(self._device.name),
            compute_capability=f"{major}.{minor}",
            integrated=bool(_call(self._device.get_attribute, driver.device_attribute.INTEGRATED)),
            cuda=version_text(_call(driver.get_driver_version)),
            multiprocessors=_call(self._device.get_attribute, driver.device_attribute.MULTIPROCESSOR_COUNT),
            memory=int(_call(self._device.total_memory)),
        )

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""
        free, total = _call(driver.mem_get_info)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory."""
        allocation = _call(driver.mem_alloc, size)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        """Give device memory back."""
        _call(self._allocations.pop(address).free)

    def allocate_host(self, shape: tuple[int, ...], dtype: DTypeLike, *, mapped: bool) -> HostBuffer:
        """A page-locked array, at its device address too if `mapped`."""
        flags = driver.host_alloc_flags.DEVICEMAP if mapped else 0
        array: NDArray[Any] = _call(driver.pagelocked_empty, shape, np.dtype(dtype), mem_flags=flags)
        memory: Any = array.base
        return HostBuffer(array, int(_call(memory.get_device_pointer)) if mapped else None)

    def free_host(self, buffer: HostBuffer) -> None:
        """Give page-locked memory back."""
        memory: Any = buffer.array.base
        _call(memory.free)

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        stream = _call(driver.Stream, 1)  # CU_STREAM_NON_BLOCKING, for which PyCUDA has no name
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream: PyCUDA does so with the last reference."""
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        """Wait for all of a stream's work; other Python threads run meanwhile."""
        _call(self._streams[stream].synchronize)

    def copy_to_device(self, address: int, source: NDArray[Any], stream: int) -> None:
        """Enqueue a copy from page-locked memory."""
        _call(driver.memcpy_htod_async, address, source, self._streams[stream])

    def copy_to_host(self, target: NDArray[Any], address: int, stream: int) -> None:
        """Enqueue a copy to page-locked memory."""
        _call(driver.memcpy_dtoh_async, target, address, self._streams[stream])

    def create_event(self) -> Any:
        """An event that takes the time, and can be waited for."""
        return _call(driver.Event, driver.event_flags.BLOCKING_SYNC)

    def destroy_event(self, event: Any) -> None:
        """Nothing to do: PyCUDA destroys it with the last reference."""

    def record(self, event: Any, stream: int) -> None:
        """Enqueue an event."""
        _call(event.record, self._streams[stream])

    def wait(self, event: Any) -> None:
        """Sleep until an event has happened; other Python threads run meanwhile."""
        _call(event.synchronize)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""
        return float(_call(start.time_till, end))

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Not available.

        Raises:
            CudaError: always.
        """
        raise CudaError("PyCUDA cannot capture CUDA graphs; install cuda-bindings for them")

    def launch(self, graph: Any, stream: int) -> None:
        """Not available.

        Raises:
            CudaError: always.
        """
        raise CudaError("PyCUDA cannot launch CUDA graphs; install cuda-bindings for them")

    def destroy_graph(self, graph: Any) -> None:
        """Nothing to do: there are none."""


def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What a PyCUDA function returns; its own exceptions as ours.

    Raises:
        CudaError: PyCUDA raised.
    """
    try:
        return function(*arguments, **keywords)
    except driver.Error as error:
        raise CudaError(f"{getattr(function, '__name__', function)}: {error}") from error
