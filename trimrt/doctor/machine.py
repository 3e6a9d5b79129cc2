"""What the machine and its software are."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from builder.compile.targets.tensorrt.timing_cache import timing_cache_folder
from models.cores import cores
from models.errors import TrimRTError
from models.files import require_writable
from runtime.cgroups import limits
from runtime.cuda.nodes import advice, device_nodes
from runtime.manifest import Backend
from runtime.processor import WIDE_SUMS, processor, restriction
from trimrt.doctor.findings import Finding
from trimrt.selftest.checks import find_device, find_library
from trimrt.selftest.machine import machine

_BACKENDS: Final[tuple[Backend, ...]] = ("openvino", "tensorrt", "tensorrt-rtx")
_ROOT: Final = Path("/")


def look_at_machine(root: Path = _ROOT) -> Iterator[Finding]:
    """The processor, the memory and what of them this process may have.

    Args:
        root: where `proc`, `sys`, `etc`, `var` and `dev` are found.
    """
    for subject, fact in machine(root).items():
        if subject != "may not open":
            yield Finding(subject=subject, state="ok", found=fact)
    yield _instruction_sets()
    yield _limits(root)


def look_at_devices(root: Path = _ROOT) -> Iterator[Finding]:
    """The GPU, the device files and the libraries of the backends."""
    nodes = device_nodes(root)
    if closed := advice(root):
        yield Finding(subject="device files", state="note", found=closed.strip())
    if nodes:
        try:
            yield Finding(subject="GPU", state="ok", found=find_device())
        except TrimRTError as error:
            yield Finding(subject="GPU", state="note", found=str(error))
    else:
        yield Finding(subject="GPU", state="ok", found="no NVIDIA GPU is here")
    for backend in _BACKENDS:
        try:
            yield Finding(subject=backend, state="ok", found=find_library(backend))
        except TrimRTError as error:
            if nodes or backend == "openvino":
                yield Finding(subject=backend, state="note", found=str(error))
            else:
                yield Finding(subject=backend, state="ok", found="not here, and neither is a GPU for it")


def look_at_packages() -> Iterator[Finding]:
    """The versions of Python packages against those that TrimRT states."""
    odd = list(_odd_packages())
    if not odd:
        yield Finding(subject="packages", state="ok", found="all versions are those that TrimRT takes")
    for found in odd:
        yield Finding(subject="packages", state="note", found=found)


def look_at_caches() -> Iterator[Finding]:
    """The folder that building keeps its timings in."""
    folder = timing_cache_folder()
    if folder is None:
        found = "this user has no home folder for it; building for TensorRT takes longer"
        yield Finding(subject="timing cache", state="note", found=found)
        return
    try:
        require_writable(folder)
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror}); building for TensorRT takes longer"
        yield Finding(subject="timing cache", state="note", found=found)
    else:
        yield Finding(subject="timing cache", state="ok", found=str(folder))


def _instruction_sets() -> Finding:
    _, features = processor()
    found = ", ".join(features) or "none that Linux names"
    if restricted := restriction():
        found += f"; ONEDNN_MAX_CPU_ISA={restricted} lets OpenVINO use no others"
    if "avx2" in features:
        sums = "32" if WIDE_SUMS.intersection(features) else "16"
        found += f"; sums of INT8 products have {sums} bits"
    return Finding(subject="instructions", state="note" if restricted else "ok", found=found)


def _limits(root: Path) -> Finding:
    found = limits(root)
    parts = [f"{found.cores:g} cores' time"] if found.cores is not None else []
    parts += [f"{found.memory / 2**30:.1f} GiB of memory"] if found.memory is not None else []
    if not parts:
        return Finding(subject="cgroup", state="ok", found="no limit")
    if found.cores is not None and found.cores < cores():
        parts.append(
            f"but threads for {cores()} cores: set --inference-threads and --decode-threads, or give the "
            "container a cpuset"
        )
    return Finding(subject="cgroup", state="note", found=", ".join(parts))


def _odd_packages() -> Iterator[str]:
    for requirement in map(Requirement, requires("trimrt") or ()):
        marker = requirement.marker
        wanted = marker is None or marker.evaluate({"extra": ""})
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            if wanted:
                yield f"{requirement.name} is not installed"
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            yield f"{requirement.name} is {here}; TrimRT takes {requirement.specifier}"
