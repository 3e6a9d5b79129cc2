"""What the accelerators of this machine say of themselves; nothing, at no cost, where there are none."""

from __future__ import annotations

from pathlib import Path

from runtime.devices.base import Device, Reading
from runtime.devices.jetson import find_jetson

__all__ = ["Device", "Reading", "find_devices"]


def find_devices(root: Path = Path("/")) -> list[Device]:
    """The accelerators that can be asked.

    Args:
        root: where `proc`, `sys` and `dev` are found.
    """
    jetson = find_jetson(root)
    found: list[Device] = [] if jetson is None else [jetson]
    if (root / "dev/nvidiactl").exists() and (jetson is None or not jetson.tells_load):
        from runtime.devices.nvml import find_gpus

        found += find_gpus()
    return found
