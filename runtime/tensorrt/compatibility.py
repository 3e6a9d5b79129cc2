"""Was a plan made for this TensorRT and this GPU? Asked before TensorRT reads a byte of it."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Final

from runtime.cuda import Device
from runtime.manifest import Compatibility, EngineError, Manifest
from runtime.tensorrt.library import TensorRTLibrary

JETSON_RELEASE: Final = Path("/etc/nv_tegra_release")
KERNEL_MODULE: Final = Path("/proc/driver/nvidia/version")
AMPERE: Final = (8, 0)
RTX_MAGIC: Final = b"vtrt"


def this_machine(device: Device | None) -> Compatibility:
    """What a plan built here is bound to; without a GPU, only the processor and system."""
    machine = Compatibility(os=platform.system(), cpu_architecture=platform.machine(), l4t=jetson_linux())
    if device is None:
        return machine
    return machine.model_copy(
        update={
            "gpu_name": device.name,
            "compute_capability": device.compute_capability,
            "cuda": device.cuda,
            "driver": driver_version(),
        }
    )


def jetson_linux(file: Path = JETSON_RELEASE) -> str | None:
    """The release of Jetson Linux (L4T), e.g. `36.4.3`; None elsewhere."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else None


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
    if built.l4t != here.l4t:
        raise _refusal(folder, manifest, f"for {_jetson(built.l4t)}; this is {_jetson(here.l4t)}")
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


def _jetson(release: str | None) -> str:
    return f"Jetson Linux {release}" if release else "no Jetson"
