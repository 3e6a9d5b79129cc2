"""What a device offers to be measured."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

Quantity = Literal[
    "utilization_ratio",
    "temperature_celsius",
    "power_watts",
    "memory_used_bytes",
    "memory_total_bytes",
    "clock_hertz",
    "clock_limit_hertz",
    "throttling_events",
]


class Reading(NamedTuple):
    """One measured value, in its base unit.

    Attributes:
        quantity: what, with its unit.
        sensor: which sensor or power rail of the device; empty when there is only one.
        value: of it.
    """

    quantity: Quantity
    sensor: str
    value: float


class Device(Protocol):
    """An accelerator."""

    @property
    def name(self) -> str:
        """As its maker calls it."""

    def read(self) -> list[Reading]:
        """What can be read now; a sensor that fails is left out."""
