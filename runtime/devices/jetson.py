"""NVIDIA Jetson, from sysfs: no daemon, no root.

GPU load and clock come from devfreq, temperatures from the thermal zones, power from the INA3221
monitors, throttling from the over-current monitor, and memory, which CPU and GPU share, from /proc/meminfo.
The memory controller's load is for root alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runtime.devices.base import Reading
from runtime.jetson import jetson_model, memory, number_of, text_of

# The counters of the kernel driver `soctherm_oc`, in the words of NVIDIA's developer guide.
_OVER_CURRENT = {1: "undervoltage", 2: "average overcurrent", 3: "instantaneous overcurrent"}


def find_jetson(root: Path) -> Jetson | None:
    """This machine, if it is a Jetson."""
    model = jetson_model(root)
    return None if model is None else Jetson(root, model)


class Jetson:
    """A Jetson module."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._root = root
        # 17000000.gpu on Orin, whose load is in the device's folder; gpu-gpc-0 on Thor, which has none.
        self._gpus = sorted((root / "sys/class/devfreq").glob("*gpu*"))
        self._zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
        folders = sorted((root / "sys/class/hwmon").glob("hwmon*"))
        monitors = [(text_of(folder / "name"), folder) for folder in folders]
        self._monitors = [folder for name, folder in monitors if name == "ina3221"]
        self._over_current = [folder for name, folder in monitors if name == "soctherm_oc"]

    def read(self) -> list[Reading]:
        """See `Device`."""
        return [
            *(*self._gpu(), *self._temperatures(), *self._power()),
            *(*self._throttling(), *self._memory()),
        ]

    @property
    def tells_load(self) -> bool:
        """Whether sysfs has the GPU's load; on Thor NVML has it."""
        return any((folder / "device/load").exists() for folder in self._gpus)

    def _gpu(self) -> Iterator[Reading]:
        for folder in self._gpus:
            load = number_of(folder / "device/load")  # in thousandths
            if load is not None:
                yield Reading("utilization_ratio", folder.name, load / 1000)
            clock = number_of(folder / "cur_freq")
            if clock is not None:
                yield Reading("clock_hertz", folder.name, clock)
            limit = number_of(folder / "max_freq")  # of the power mode
            if limit is not None:
                yield Reading("clock_limit_hertz", folder.name, limit)

    def _temperatures(self) -> Iterator[Reading]:
        for zone in self._zones:
            kind, millidegrees = text_of(zone / "type"), number_of(zone / "temp")
            # The zone of a part that is powered off cannot be read, or reads -256 degrees.
            if kind and millidegrees is not None and millidegrees > -100_000:
                yield Reading("temperature_celsius", kind, millidegrees / 1000)

    def _power(self) -> Iterator[Reading]:
        for monitor in self._monitors:
            for label in sorted(monitor.glob("in*_label")):
                number = label.name.removeprefix("in").removesuffix("_label")
                millivolts = number_of(monitor / f"in{number}_input")
                milliamperes = number_of(monitor / f"curr{number}_input")
                if millivolts is not None and milliamperes is not None:
                    yield Reading("power_watts", text_of(label) or number, millivolts * milliamperes / 1e6)

    def _throttling(self) -> Iterator[Reading]:
        for folder in self._over_current:
            for number, name in _OVER_CURRENT.items():
                events = number_of(folder / f"oc{number}_event_cnt")
                if events is not None:
                    yield Reading("throttling_events", name, events)

    def _memory(self) -> Iterator[Reading]:
        found = memory(self._root)
        if {"MemTotal", "MemAvailable"} <= found.keys():
            yield Reading("memory_total_bytes", "", found["MemTotal"])
            yield Reading("memory_used_bytes", "", found["MemTotal"] - found["MemAvailable"])
