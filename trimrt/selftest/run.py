"""The checks in their order, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field

from builder.compile.packages import package_name
from builder.compile.targets.choice import choose_backend, open_target
from builder.kit import open_kit
from models.errors import TrimRTError
from runtime.cuda.nodes import device_nodes
from runtime.manifest import Backend, Precision
from trimrt.selftest import checks
from trimrt.selftest.checks import Check, Latency
from trimrt.selftest.machine import machine

# TensorRT-RTX computes INT8 convolutions in part in FP32; there FP16 is the precision to use.
_PRECISIONS: Final[dict[Backend, tuple[Precision, ...]]] = {
    "openvino": ("fp16", "int8"),
    "tensorrt": ("fp16", "int8"),
    "tensorrt-rtx": ("fp16",),
}


class Result(BaseModel):
    """What a check found."""

    check: str
    passed: bool
    found: str
    seconds: float


class SelfTest(BaseModel):
    """`trimrt selftest --json`."""

    backend: Backend
    reason: str = Field(description="why this backend")
    machine: dict[str, str]
    results: list[Result] = []
    latencies: list[Latency] = []
    engines: int = Field(default=0, description="that were built or loaded, and checked")

    @property
    def passed(self) -> bool:
        """Whether an engine ran, and nothing failed."""
        return self.engines > 0 and all(result.passed for result in self.results)


def choose() -> tuple[Backend, str]:
    """The backend to test, and why: where there is an NVIDIA GPU, OpenVINO alone would be no test of it."""
    backend, reason = choose_backend()
    if backend == "openvino" and (nodes := device_nodes()):
        return "tensorrt", f"{nodes[0]} is here, so there is an NVIDIA GPU"
    return backend, reason


def run(backend: Backend, reason: str, folder: Path, soak: float, tell: Callable[[Result], None]) -> SelfTest:
    """Test this machine.

    Args:
        backend: what to test.
        reason: why.
        folder: packages of the kit's network that are there are tested, those that are missing are built.
        soak: seconds for each engine's last check.
        tell: takes each result as soon as it is known.
    """
    test = SelfTest(backend=backend, reason=reason, machine=machine())
    examine = partial(_examine, test, tell)
    ready = examine("library", partial(checks.find_library, backend))
    if backend != "openvino":
        ready = examine("GPU", checks.find_device) and ready
    if not ready:
        return test
    kit = open_kit(checks.KIT)
    images = kit.verification
    for precision in _PRECISIONS[backend]:
        if not examine(f"{precision}: build", partial(checks.build, kit, backend, precision, folder)):
            continue
        package = folder / package_name(kit, open_target(backend), precision)
        test.engines += 1
        examine(f"{precision}: labels", partial(checks.check_labels, package, images))
        examine(f"{precision}: batches", partial(checks.check_batches, package, images))
        if backend != "openvino":
            examine(f"{precision}: CUDA graphs", partial(checks.check_graphs, package, images))
        examine(f"{precision}: slots", partial(checks.check_slots, package, images))
        examine(f"{precision}: speed", partial(checks.time_batches, package, test.latencies))
        examine(f"{precision}: soak", partial(checks.soak, package, images, soak))
    return test


def _examine(test: SelfTest, tell: Callable[[Result], None], name: str, check: Check) -> bool:
    """Run a check; what it raises is its finding."""
    started = time.monotonic()
    try:
        found, passed = check(), True
    except TrimRTError as error:
        found, passed = str(error), False
    except Exception as error:  # a defect, which must not hide what the other checks find
        found, passed = f"{type(error).__name__}: {error}", False
    result = Result(check=name, passed=passed, found=found, seconds=time.monotonic() - started)
    test.results.append(result)
    tell(result)
    return passed
