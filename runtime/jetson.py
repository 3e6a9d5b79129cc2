"""What Linux says of an NVIDIA Jetson, on the host and in containers: model, release, memory, power mode."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

_ROOT: Final = Path("/")
_RELEASE: Final = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
_MEMORY: Final = re.compile(r"^(Mem\w+):\s+(\d+) kB$", re.MULTILINE)
_MODE: Final = re.compile(r"pmode:(\d+)")


class Power(BaseModel):
    """How fast a Jetson may run; figures of one board differ by tens of percent between its modes.

    Frequencies are in hertz; None: Linux does not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: str | None = Field(
        default=None, description="nvpmodel's, e.g. `15W`; containers see it only where its files are mounted"
    )
    gpu_max_hz: int | None = Field(default=None, description="most that the mode allows the GPU")
    gpu_fixed: bool | None = Field(default=None, description="whether the GPU's clock is held there")
    cpu_max_hz: int | None = Field(default=None, description="most that the mode allows the first core")
    cores: int | None = Field(default=None, description="cores that the mode leaves on")

    def __str__(self) -> str:
        parts = [f"mode {self.mode}" if self.mode else "mode unknown"]
        if self.gpu_max_hz is not None:
            held = ", held there" if self.gpu_fixed else ", not held there (`sudo jetson_clocks` does that)"
            parts.append(f"GPU up to {self.gpu_max_hz / 1e6:.0f} MHz{held}")
        if self.cpu_max_hz is not None:
            parts.append(f"CPU up to {self.cpu_max_hz / 1e6:.0f} MHz")
        if self.cores is not None:
            parts.append(f"{self.cores} cores on")
        return "; ".join(parts)


def jetson_model(root: Path = _ROOT) -> str | None:
    """The board's name; None where this is no Jetson.

    Containers do not see the device tree, which lies in the masked /sys/firmware; there the kernel's
    description of the chip tells, as it tells NVIDIA's container toolkit.
    """
    compatible = text_of(root / "proc/device-tree/compatible") or ""
    family = text_of(root / "sys/devices/soc0/family") or ""
    if "nvidia,tegra" not in compatible and not family.lower().startswith("tegra"):
        return None
    model = text_of(root / "proc/device-tree/model") or text_of(root / "sys/devices/soc0/machine")
    return model or "NVIDIA Jetson"


def jetson_linux(root: Path = _ROOT) -> str | None:
    """The release of Jetson Linux (L4T), e.g. `36.4.3`; None elsewhere, and in most containers."""
    match = _RELEASE.search(text_of(root / "etc/nv_tegra_release") or "")
    return f"{match[1]}.{match[2]}" if match else None


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes that programs can still have, the page cache among them, which the kernel gives up for them.

    CUDA's own figure on a Jetson, whose GPU shares this memory, leaves the page cache out.
    """
    return memory(root).get("MemAvailable")


def memory(root: Path = _ROOT) -> dict[str, int]:
    """Bytes of `MemTotal`, `MemAvailable` and the like; empty where Linux does not say."""
    found = _MEMORY.findall(text_of(root / "proc/meminfo") or "")
    return {name: int(kibibytes) * 1024 for name, kibibytes in found}


def power(root: Path = _ROOT) -> Power | None:
    """The power mode and the clocks that it allows; None where this is no Jetson."""
    if jetson_model(root) is None:
        return None
    gpu = next(iter(sorted((root / "sys/class/devfreq").glob("*gpu*"))), root / "absent")
    least, most = number_of(gpu / "min_freq"), number_of(gpu / "max_freq")
    cpus = root / "sys/devices/system/cpu"
    kilohertz = number_of(cpus / "cpu0/cpufreq/scaling_max_freq")
    return Power(
        mode=_mode(root),
        gpu_max_hz=most,
        gpu_fixed=None if least is None or most is None else least == most,
        cpu_max_hz=None if kilohertz is None else 1000 * kilohertz,
        cores=_cores(text_of(cpus / "online") or ""),
    )


def _mode(root: Path) -> str | None:
    """The mode's name in nvpmodel's configuration, or its number."""
    match = _MODE.search(text_of(root / "var/lib/nvpmodel/status") or "")
    if match is None:
        return None
    number = int(match[1])
    configured = text_of(root / "etc/nvpmodel.conf") or ""
    name = re.search(rf"^<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=([^\s>]+)", configured, re.MULTILINE)
    return name[1] if name else str(number)


def _cores(ranges: str) -> int | None:
    """How many cores a list such as `0-3,6` names."""
    found = re.findall(r"(\d+)(?:-(\d+))?", ranges)
    return sum(int(last or first) - int(first) + 1 for first, last in found) or None


def text_of(path: Path) -> str | None:
    """What a file of `proc` or `sys` says; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\n")
    except OSError:
        return None


def number_of(path: Path) -> int | None:
    """The whole number in a file; None where there is none."""
    try:
        return int(text_of(path) or "")
    except ValueError:
        return None
