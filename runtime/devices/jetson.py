"""NVIDIA Jetson, from sysfs: no daemon, no root.

GPU load and clock come from devfreq, temperatures from the thermal zones, power from the INA3221
monitors, and memory, which CPU and GPU share, from /proc/meminfo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from runtime.devices.base import Device, Reading
from runtime.jetson import jetson_model

_MEMINFO = re.compile(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", re.MULTILINE)


def find_jetson(root: Path) -> Device | None:
    """This machine, if it is a Jetson."""
    model = jetson_model(root)
    return None if model is None else Jetson(root, model)


class Jetson:
    """A Jetson module."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._root = root
        # 17000000.gpu on Orin, gpu-gpc-0 on Thor; its load is in the device's folder or in devfreq's own.
        self._gpus = sorted((root / "sys/class/devfreq").glob("*gpu*"))
        self._zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
        self._monitors = [
            folder
            for folder in sorted((root / "sys/class/hwmon").glob("hwmon*"))
            if _text(folder / "name") == "ina3221"
        ]

    def read(self) -> list[Reading]:
        """See `Device`."""
        return [*self._gpu(), *self._temperatures(), *self._power(), *self._memory()]

    def _gpu(self) -> Iterator[Reading]:
        for folder in self._gpus:
            load = _number(folder / "device/load")  # in thousandths
            if load is not None:
                yield Reading("utilization_ratio", folder.name, load / 1000)
            clock = _number(folder / "cur_freq")
            if clock is not None:
                yield Reading("clock_hertz", folder.name, clock)

    def _temperatures(self) -> Iterator[Reading]:
        for zone in self._zones:
            kind, millidegrees = _text(zone / "type"), _number(zone / "temp")
            # The zone of a part that is powered off cannot be read, or reads -256 degrees.
            if kind and millidegrees is not None and millidegrees > -100_000:
                yield Reading("temperature_celsius", kind, millidegrees / 1000)

    def _power(self) -> Iterator[Reading]:
        for monitor in self._monitors:
            for label in sorted(monitor.glob("in*_label")):
                number = label.name.removeprefix("in").removesuffix("_label")
                millivolts = _number(monitor / f"in{number}_input")
                milliamperes = _number(monitor / f"curr{number}_input")
                if millivolts is not None and milliamperes is not None:
                    yield Reading("power_watts", _text(label) or number, millivolts * milliamperes / 1e6)

    def _memory(self) -> Iterator[Reading]:
        kibibytes = dict(_MEMINFO.findall(_text(self._root / "proc/meminfo") or ""))
        if len(kibibytes) == 2:
            total, available = int(kibibytes["MemTotal"]) * 1024, int(kibibytes["MemAvailable"]) * 1024
            yield Reading("memory_total_bytes", "", total)
            yield Reading("memory_used_bytes", "", total - available)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
