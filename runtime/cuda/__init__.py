"""What the TensorRT runtime needs of CUDA: a small interface with two implementations.

`cuda-bindings` (NVIDIA's own, wheels for every platform) can capture CUDA graphs; PyCUDA cannot.
Addresses and streams are integers, as TensorRT takes them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from numpy.typing import DTypeLike, NDArray

from runtime.manifest import EngineError

CudaName = Literal["cuda-bindings", "pycuda"]

IMPLEMENTATIONS: Final[dict[CudaName, str]] = {
    "cuda-bindings": "runtime.cuda.bindings:BindingsCuda",
    "pycuda": "runtime.cuda.pycuda:PycudaCuda",
}


class CudaError(EngineError):
    """A CUDA call failed; the message names the call and the error."""


class DeviceLostError(CudaError):
    """No later call of this process can succeed: its GPU, or its context there, is gone."""


class CudaUnavailableError(EngineError):
    """No usable CUDA interface on this machine; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Device:
    """The GPU in use.

    Attributes:
        name: e.g. `Orin`.
        compute_capability: e.g. `8.7`.
        integrated: it shares the CPU's memory (Jetson).
        cuda: newest CUDA version the driver supports, e.g. `12.6`.
        multiprocessors: how many it has (SMs).
        memory: all of its memory, in bytes; what CUDA says, which is a little less than what is sold.
    """

    name: str
    compute_capability: str
    integrated: bool
    cuda: str
    multiprocessors: int
    memory: int


@dataclass(frozen=True)
class HostBuffer:
    """Page-locked memory of the host.

    Attributes:
        array: the memory; not to be touched after it is freed.
        device_address: where the GPU sees it, if it is mapped.
    """

    array: NDArray[Any]
    device_address: int | None


class Cuda(Protocol):
    """CUDA on one device. Every method but `attach_thread` needs the calling thread to be attached.

    All methods raise CudaError when CUDA returns anything but success.
    """

    @property
    def name(self) -> CudaName:
        """Which implementation this is."""

    @property
    def captures_graphs(self) -> bool:
        """Is there `capture` and `launch`?"""

    def attach_thread(self) -> None:
        """Make the device's primary context current in the calling thread."""

    def detach_thread(self) -> None:
        """Undo `attach_thread`."""

    def device(self) -> Device:
        """What the device is."""

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory."""

    def free(self, address: int) -> None:
        """Give device memory back."""

    def allocate_host(self, shape: tuple[int, ...], dtype: DTypeLike, *, mapped: bool) -> HostBuffer:
        """A page-locked array, at its device address too if `mapped`."""

    def free_host(self, buffer: HostBuffer) -> None:
        """Give page-locked memory back."""

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""

    def synchronize(self, stream: int) -> None:
        """Wait for all of a stream's work."""

    def copy_to_device(self, address: int, source: NDArray[Any], stream: int) -> None:
        """Enqueue a copy from page-locked memory."""

    def copy_to_host(self, target: NDArray[Any], address: int, stream: int) -> None:
        """Enqueue a copy to page-locked memory."""

    def create_event(self) -> Any:
        """An event that takes the time, and can be waited for."""

    def destroy_event(self, event: Any) -> None:
        """Destroy an event."""

    def record(self, event: Any, stream: int) -> None:
        """Enqueue an event."""

    def wait(self, event: Any) -> None:
        """Sleep until an event has happened; a thread that spins would take a core from decoding."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """An executable graph of what `enqueue` puts into the stream, without running it.

        Only the calling thread is restricted while it captures. What `enqueue` raises is raised
        again after the capture was ended and thrown away.
        """

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a graph."""

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph."""


def open_cuda(name: CudaName | None = None) -> Cuda:
    """The CUDA interface of that name; by default the first that is installed, `cuda-bindings` before PyCUDA.

    Raises:
        CudaUnavailableError: it is not installed, or there is no driver or GPU.
    """
    missing = []
    for candidate in (name,) if name else IMPLEMENTATIONS:
        module, _, attribute = IMPLEMENTATIONS[candidate].partition(":")
        try:
            implementation: Cuda = getattr(importlib.import_module(module), attribute)()
        except ImportError as error:
            missing.append(f"{candidate}: {error}")
        else:
            return implementation
    raise CudaUnavailableError(
        f"no CUDA interface is installed ({'; '.join(missing)}); "
        "`pip install trimrt[cuda]` brings cuda-bindings"
    )


@contextmanager
def attached(cuda: Cuda) -> Iterator[Cuda]:
    """Attach the calling thread for as long as the context lasts.

    Raises:
        CudaError: it cannot be attached.
    """
    cuda.attach_thread()
    try:
        yield cuda
    finally:
        cuda.detach_thread()


def version_text(version: int) -> str:
    """CUDA's way to write a version, e.g. 12060, as `12.6`."""
    return f"{version // 1000}.{version % 1000 // 10}"
