"""What a container or a systemd unit lets this process have: its cgroup's limits, as version 2 tells them."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from runtime.jetson import number_of, text_of

_MOUNT: Final = "sys/fs/cgroup"


class Limits(NamedTuple):
    """The tightest of the cgroup and those above it; None: no limit, or none that is seen from here.

    Attributes:
        cores: of processor time.
        memory: bytes.
    """

    cores: float | None
    memory: int | None


def limits(root: Path = Path("/")) -> Limits:
    """The limits of this process.

    Args:
        root: where `proc` and `sys` are found.
    """
    lines = (text_of(root / "proc/self/cgroup") or "").splitlines()
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if own is None:
        return Limits(None, None)
    mount = root / _MOUNT
    group = mount / own.lstrip("/")
    groups = [group, *group.parents[: len(group.relative_to(mount).parts)]]
    cores = [share for each in groups if (share := _cores(text_of(each / "cpu.max") or "")) is not None]
    memory = [most for each in groups if (most := number_of(each / "memory.max")) is not None]
    return Limits(min(cores, default=None), min(memory, default=None))


def _cores(quota: str) -> float | None:
    """Of `cpu.max`: microseconds of processor time in each period, and the period."""
    time, _, period = quota.partition(" ")
    return int(time) / int(period) if time.isdigit() and period.isdigit() else None
