"""NVIDIA GPUs of PCs and servers, through NVML; needs the package `nvidia-ml-py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from runtime.devices.base import Quantity, Reading

log = logging.getLogger("trimrt.devices")


def find_gpus() -> list[Gpu]:
    """The GPUs that NVML shows; none without the package or a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [Gpu(pynvml, number) for number in range(pynvml.nvmlDeviceGetCount())]
    except ImportError:
        log.info("no GPU telemetry: nvidia-ml-py is not installed")
    except pynvml.NVMLError as error:
        log.info("no GPU telemetry: %s", error)
    return []


class Gpu:
    """One GPU."""

    def __init__(self, nvml: Any, number: int) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(number)
        self.name = f"{number}: {nvml.nvmlDeviceGetName(self._handle)}"

    def read(self) -> list[Reading]:
        """See `Device`."""
        nvml, handle = self._nvml, self._handle
        questions: list[tuple[Quantity, Callable[[], float]]] = [
            ("utilization_ratio", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            ("temperature_celsius", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            ("power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            ("memory_used_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
            ("memory_total_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
            ("clock_hertz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6),
        ]
        readings = []
        for quantity, ask in questions:
            try:
                readings.append(Reading(quantity, "", float(ask())))
            except nvml.NVMLError:  # not every GPU has every sensor
                continue
        return readings
