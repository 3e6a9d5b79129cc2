"""The checks of a GPU, over stand-ins for CUDA and TensorRT: what is right passes, what is wrong is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recorded_machine import CLASSES, SIZE, Machine, write_package
from recording_cuda import DESKTOP, ORIN, RecordingCuda, logits_of

from builder.kit import VerificationSet
from runtime.manifest import BatchSizes
from trimrt.selftest import checks
from trimrt.selftest.checks import CheckFailedError, Latency


@pytest.fixture
def images() -> VerificationSet:
    pixels = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
    logits = logits_of(pixels, CLASSES)
    return VerificationSet("noise", pixels, logits.argmax(axis=1), logits, len(pixels))


@pytest.fixture(params=[DESKTOP, ORIN], ids=["graphics card", "Jetson"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    cuda = RecordingCuda(request.param)
    found = Machine(monkeypatch, cuda)
    found.trt.profiles = [(1, 8, 32)]
    monkeypatch.setattr(checks, "open_cuda", lambda: cuda)
    monkeypatch.setattr(checks, "available_memory", lambda: 4 << 30)
    return found


@pytest.fixture
def package(machine: Machine, tmp_path: Path) -> Path:
    device = machine.cuda._device
    return write_package(tmp_path / "package", device=device, batch=BatchSizes(min=1, opt=8, max=32))


def test_what_is_right_passes(machine: Machine, package: Path, images: VerificationSet) -> None:
    assert checks.check_labels(package, images).startswith("100.0% of 64 labels")
    assert "labels are the FP32 network's" in checks.check_batches(package, images)
    assert checks.check_slots(package, images).startswith("3 at once")
    assert "0.0e+00" in checks.check_graphs(package, images)
    assert "use" in checks.soak(package, images, 0)
    assert machine.cuda.in_use() == 0


def test_it_is_timed_with_graphs_and_without(package: Path) -> None:
    latencies: list[Latency] = []
    checks.time_batches(package, latencies)
    assert [(row.cuda_graphs, row.batch) for row in latencies] == [
        (graphs, batch) for graphs in (True, False) for batch in (1, 8, 32)
    ]


def test_the_device_is_described(machine: Machine) -> None:
    said = checks.find_device()
    assert said.startswith(f"{machine.cuda._device.name}, compute capability")
    assert "4.0 of 8.0 GiB free" in said


def test_a_graph_that_replays_something_else_is_found(
    machine: Machine, package: Path, images: VerificationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the first graph of all were launched whatever was asked for."""
    launch = machine.cuda.launch
    monkeypatch.setattr(
        machine.cuda, "launch", lambda _graph, stream: launch(min(machine.cuda.graphs), stream)
    )
    with pytest.raises(CheckFailedError, match="logits differ by"):
        checks.check_graphs(package, images)
    with pytest.raises(CheckFailedError, match="are not the FP32 network's"):
        checks.check_batches(package, images)


def test_memory_that_grows_is_found(
    machine: Machine, package: Path, images: VerificationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter(range(4 << 30, 0, -(8 << 20)))
    monkeypatch.setattr(machine.cuda, "memory", lambda: (next(free), 8 << 30))
    available = iter(range(4 << 30, 0, -(300 << 20)))
    monkeypatch.setattr(checks, "available_memory", lambda: next(available))
    with pytest.raises(CheckFailedError, match=r"(the device's use|of the shared memory) grew by \d+"):
        checks.soak(package, images, 0)
