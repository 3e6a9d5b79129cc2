"""Was a plan made for this TensorRT and this GPU? Asked before TensorRT reads a byte of it."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Final

from runtime.cuda import Device
from runtime.jetson import jetson_linux, jetson_model
from runtime.manifest import Compatibility, EngineError, Manifest
from runtime.tensorrt.library import TensorRTLibrary

KERNEL_MODULE: Final = Path("/proc/driver/nvidia/version")
AMPERE: Final = (8, 0)
MOST_MEMORY_DIFFERENCE: Final = 0.25  # of one model: what Linux keeps for itself differs by release
RTX_MAGIC: Final = b"vtrt"


def this_machine(device: Device | None, root: Path = Path("/")) -> Compatibility:
    """What a plan built here is bound to; without a GPU, only the processor and system.

    Args:
        device: the GPU.
        root: where `proc`, `sys` and `etc` are found.
    """
    machine = Compatibility(
        os=platform.system(),
        cpu_architecture=platform.machine(),
        l4t=jetson_linux(root),
        board=jetson_model(root),
    )
    if device is None:
        return machine
    return machine.model_copy(
        update={
            "gpu_name": device.name,
            "compute_capability": device.compute_capability,
            "cuda": device.cuda,
            "driver": driver_version(),
            "multiprocessors": device.multiprocessors,
            "memory_mib": device.memory >> 20,
        }
    )


def driver_version(file: Path = KERNEL_MODULE) -> str | None:
    """The NVIDIA driver's version, e.g. `580.95.05`; None where the file does not tell."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", file.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None


def check_version(folder: Path, manifest: Manifest, library: TensorRTLibrary, *, host_code: bool) -> None:
    """Refuse a plan that another version of TensorRT built.

    Raises:
        EngineError: it does not load here; the message says what would.
    """
    built, here = manifest.backend_version, library.version
    if manifest.compatibility.version_compatible:
        if _version(built) > _version(here):
            raise _refusal(folder, manifest, f"by {manifest.backend} {built}, newer than the {here} here")
        if not host_code:
            raise EngineError(
                f"{folder} is a version-compatible plan, which carries code that runs on the CPU; allow it "
                f"(--host-code) if you trust where it comes from, or rebuild it: {manifest.build_command}"
            )
    elif built != here:
        raise _refusal(folder, manifest, f"by {manifest.backend} {built}; here is {manifest.backend} {here}")


def check_machine(folder: Path, manifest: Manifest, here: Compatibility) -> None:
    """Refuse a plan for another GPU, system or processor.

    Raises:
        EngineError: it was built for something else; the message says what, and how to rebuild it.
    """
    built = manifest.compatibility
    if (built.os, built.cpu_architecture) != (here.os, here.cpu_architecture):
        raise _refusal(
            folder,
            manifest,
            f"for {built.os} on {built.cpu_architecture}; this is {here.os} on {here.cpu_architecture}",
        )
    if difference := _other_jetson(built, here):
        raise _refusal(folder, manifest, difference)
    capability = here.compute_capability or "none"
    if manifest.backend == "tensorrt-rtx" or built.hardware_compatible:
        listed = built.compute_capabilities
        if capability not in listed if listed else _version(capability) < AMPERE:
            wanted = ", ".join(listed) or "8.0 and later"
            raise _refusal(
                folder,
                manifest,
                f"for compute capability {wanted}; {here.gpu_name} has {capability}",
            )
    elif (built.gpu_name, built.compute_capability) != (here.gpu_name, here.compute_capability):
        raise _refusal(
            folder,
            manifest,
            f"for {built.gpu_name} (compute capability {built.compute_capability}); "
            f"this is {here.gpu_name} ({capability})",
        )
    elif difference := _other_size(built, here):
        raise _refusal(folder, manifest, difference)


def check_kind(folder: Path, manifest: Manifest, plan: bytes) -> None:
    """Refuse an artefact of another library than the manifest says.

    Raises:
        EngineError: TensorRT would be given something that is not its own.
    """
    if plan.startswith(RTX_MAGIC) != (manifest.backend == "tensorrt-rtx"):
        raise _refusal(
            folder,
            manifest,
            f"by something else: {manifest.provenance.artefact} is no {manifest.backend} plan",
        )


def _refusal(folder: Path, manifest: Manifest, difference: str) -> EngineError:
    return EngineError(f"{folder} was built {difference}. Rebuild it here: {manifest.build_command}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _other_jetson(built: Compatibility, here: Compatibility) -> str | None:
    """How the Jetson that a plan was built on differs from this machine, as far as both are known.

    Containers do not see the release of Jetson Linux, and earlier manifests do not name the board. Releases
    of one number have the same libraries but for TensorRT and CUDA, whose versions are compared exactly.
    """
    if not (built.board or built.l4t):
        return None  # the GPU's name tells a PC's from a Jetson's
    if not (here.board or here.l4t):
        return f"for {_jetson(built)}; this is no Jetson"
    if built.l4t and here.l4t and _version(built.l4t)[:1] != _version(here.l4t)[:1]:
        return f"for {_jetson(built)}; this is {_jetson(here)}"
    if built.cuda and here.cuda and built.cuda != here.cuda:
        return f"for CUDA {built.cuda}; here is CUDA {here.cuda}"
    return None


def _other_size(built: Compatibility, here: Compatibility) -> str | None:
    """How a GPU of the same name differs: every Jetson Orin's is called `Orin`."""
    if built.multiprocessors and here.multiprocessors and built.multiprocessors != here.multiprocessors:
        return (
            f"for {built.gpu_name} with {built.multiprocessors} multiprocessors; this one has "
            f"{here.multiprocessors}, for which other kernels are the fastest"
        )
    if built.memory_mib and here.memory_mib:
        difference = abs(built.memory_mib - here.memory_mib) / max(built.memory_mib, here.memory_mib)
        if difference > MOST_MEMORY_DIFFERENCE:
            return (
                f"for {built.gpu_name} with {built.memory_mib} MiB of memory; this one has {here.memory_mib}"
            )
    return None


def _jetson(machine: Compatibility) -> str:
    return f"Jetson Linux {machine.l4t}" if machine.l4t else f"{machine.board}"
