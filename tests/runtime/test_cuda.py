"""The CUDA interface: how it is chosen, what it says without a GPU, and PyCUDA's contexts and threads."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from runtime.cuda import (
    IMPLEMENTATIONS,
    CudaError,
    CudaUnavailableError,
    Device,
    DeviceLostError,
    open_cuda,
    version_text,
)

runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

from runtime.cuda import bindings  # noqa: E402  # needs cuda-bindings

HAS_DRIVER = runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess
without_driver = pytest.mark.skipif(HAS_DRIVER, reason="this machine has a GPU")


@without_driver
def test_without_a_driver_the_reason_and_the_remedy_are_told():
    with pytest.raises(
        CudaUnavailableError, match=r"cudaErrorInsufficientDriver.*'cuda-bindings>=12\.8,<13'"
    ):
        open_cuda()


@without_driver
def test_device_files_that_may_not_be_opened_are_part_of_the_reason(monkeypatch):
    monkeypatch.setattr(bindings, "advice", lambda: " This process may not open /dev/nvmap (group video, 44)")
    with pytest.raises(CudaUnavailableError, match=r"may not open /dev/nvmap \(group video, 44\)"):
        open_cuda()


@without_driver
def test_an_error_of_cudas_names_the_call():
    with pytest.raises(CudaError, match=r"^cudaMalloc: cudaErrorInsufficientDriver: CUDA driver version"):
        bindings._call(runtime.cudaMalloc, 16)


@pytest.mark.parametrize(
    ("status", "kind"),
    [("cudaErrorIllegalAddress", DeviceLostError), ("cudaErrorMemoryAllocation", CudaError)],
)
def test_an_error_that_lasts_is_told_from_one_that_passes(status, kind):
    def launch():
        return (getattr(runtime.cudaError_t, status),)

    with pytest.raises(CudaError, match=f"^launch: {status}: ") as caught:
        bindings._call(launch)
    assert type(caught.value) is kind


@pytest.fixture
def orin(monkeypatch) -> bindings.BindingsCuda:
    """`cuda-bindings` whose calls that need a driver answer as they do on an Orin Nano."""
    properties = runtime.cudaDeviceProp()
    properties.name, properties.major, properties.minor = b"Orin".ljust(256, b"\0"), 8, 7
    properties.integrated, properties.multiProcessorCount, properties.totalGlobalMem = 1, 8, 8 << 30

    def answer(name, value):
        monkeypatch.setattr(runtime, name, lambda *_: (runtime.cudaError_t.cudaSuccess, value))

    answer("cudaGetDeviceCount", 1)
    answer("cudaGetDeviceProperties", properties)
    answer("cudaDriverGetVersion", 12060)
    return bindings.BindingsCuda()


def test_cuda_bindings_describe_the_device(orin):
    assert orin.device() == Device("Orin", "8.7", True, "12.6", multiprocessors=8, memory=8 << 30)


def test_who_waits_for_an_event_of_cuda_bindings_sleeps(orin, monkeypatch):
    made = []

    def create(flags):
        made.append(flags)
        return runtime.cudaError_t.cudaSuccess, object()

    monkeypatch.setattr(runtime, "cudaEventCreateWithFlags", create)
    orin.create_event()
    assert made == [runtime.cudaEventBlockingSync]


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.delitem(sys.modules, "runtime.cuda.pycuda", raising=False)
    with pytest.raises(CudaUnavailableError, match=r"pycuda: .*pip install trimrt\[cuda\]"):
        open_cuda("pycuda")


def test_cuda_bindings_are_preferred():
    assert list(IMPLEMENTATIONS) == ["cuda-bindings", "pycuda"]


@pytest.mark.parametrize(("number", "text"), [(12060, "12.6"), (13020, "13.2"), (0, "0.0")])
def test_cudas_version_numbers(number, text):
    assert version_text(number) == text


class RecordingDriver(ModuleType):
    """Stands in for `pycuda.driver`, which needs a driver to import; its context stack is per thread."""

    class Error(Exception):
        """PyCUDA's base class."""

    class _Memory:
        def __init__(self, driver, size):
            self._driver, self.address = driver, 0x1000 * (1 + len(driver.calls))
            self.freed = False

        def __int__(self):
            return self.address

        def free(self):
            self._driver.note("free")
            self.freed = True

    def __init__(self):
        super().__init__("pycuda.driver")
        self.calls: list[str] = []
        self.stacks: dict[int, int] = {}
        self.host_alloc_flags = SimpleNamespace(DEVICEMAP=2)
        self.device_attribute = SimpleNamespace(INTEGRATED="integrated", MULTIPROCESSOR_COUNT="sms")
        self.Context = SimpleNamespace(pop=self._pop)
        self.Device = self._device
        self.event_flags = SimpleNamespace(BLOCKING_SYNC=1)
        self.Event = lambda flags=0: self.note(f"Event({flags})")
        self.Stream = self._stream

    def note(self, name):
        self.calls.append(name)
        if not self.stacks.get(threading.get_ident()):
            raise self.Error(f"{name} failed: invalid device context - no currently active context?")

    def init(self):
        self.calls.append("init")

    def _device(self, index):
        if index > 0:
            raise self.Error("cuDeviceGet failed: invalid device ordinal")
        return SimpleNamespace(
            retain_primary_context=lambda: SimpleNamespace(push=self._push),
            name=lambda: "Orin",
            compute_capability=lambda: (8, 7),
            get_attribute=lambda attribute: {"integrated": 1, "sms": 8}[attribute],
            total_memory=lambda: 8 << 30,
        )

    def _push(self):
        self.calls.append("push")
        self.stacks[threading.get_ident()] = self.stacks.get(threading.get_ident(), 0) + 1

    def _pop(self):
        self.note("pop")
        self.stacks[threading.get_ident()] -= 1

    def _stream(self, flags):
        self.note(f"Stream({flags})")
        return SimpleNamespace(handle=77, synchronize=lambda: self.note("synchronize"))

    def get_driver_version(self):
        return 12060

    def mem_get_info(self):
        self.note("mem_get_info")
        return 1 << 30, 8 << 30

    def mem_alloc(self, size):
        self.note("mem_alloc")
        return self._Memory(self, size)

    def memcpy_htod_async(self, address, source, stream):
        self.note(f"memcpy_htod_async({source.nbytes}, {stream.handle})")


@pytest.fixture
def driver(monkeypatch) -> RecordingDriver:
    package, driver = ModuleType("pycuda"), RecordingDriver()
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.delitem(sys.modules, "runtime.cuda.pycuda", raising=False)
    return driver


def test_pycuda_pushes_the_primary_context_once_in_the_thread_that_works(driver):
    cuda = open_cuda("pycuda")
    assert driver.calls == ["init"], "nothing is pushed in the thread that only loads"
    failed = []

    def work():
        try:
            cuda.attach_thread()
            stream = cuda.create_stream()
            address = cuda.allocate(64)
            cuda.copy_to_device(address, np.zeros(64, np.uint8), stream)
            cuda.synchronize(stream)
            cuda.free(address)
            cuda.destroy_stream(stream)
            cuda.detach_thread()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
    assert driver.calls[1:] == [
        "push",
        "Stream(1)",
        "mem_alloc",
        "memcpy_htod_async(64, 77)",
        "synchronize",
        "free",
        "pop",
    ]
    assert set(driver.stacks.values()) == {0}


def test_pycudas_errors_become_ours(driver):
    cuda = open_cuda("pycuda")
    with pytest.raises(CudaError, match="no currently active context"):
        cuda.allocate(64)


def test_pycuda_describes_the_device(driver):
    device = open_cuda("pycuda").device()
    assert device == Device("Orin", "8.7", True, "12.6", multiprocessors=8, memory=8 << 30)


def test_who_waits_for_an_event_of_pycudas_sleeps(driver):
    cuda = open_cuda("pycuda")
    cuda.attach_thread()
    cuda.create_event()
    assert driver.calls[-1] == "Event(1)"


def test_pycuda_captures_no_graphs_and_says_what_does(driver):
    cuda = open_cuda("pycuda")
    assert not cuda.captures_graphs
    with pytest.raises(CudaError, match="install cuda-bindings"):
        cuda.capture(1, lambda: None)


def test_autoinit_is_never_imported(driver):
    open_cuda("pycuda")
    assert "pycuda.autoinit" not in sys.modules
    assert "pycuda.autoprimaryctx" not in sys.modules
