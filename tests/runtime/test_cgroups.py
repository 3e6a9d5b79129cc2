"""The limits of a container or a unit, as cgroup v2 lays its files out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from runtime.cgroups import Limits, limits

GIB = 1 << 30

FILES: dict[str, tuple[Mapping[str, str], Limits]] = {
    "a container": (
        {"": "0::/\n", "cpu.max": "150000 100000\n", "memory.max": f"{4 * GIB}\n"},
        Limits(1.5, 4 * GIB),
    ),
    "no limit": ({"": "0::/\n", "cpu.max": "max 100000\n", "memory.max": "max\n"}, Limits(None, None)),
    "a unit in a slice": (
        {
            "": "0::/system.slice/trimrt.service\n",
            "system.slice/cpu.max": "400000 100000\n",
            "system.slice/memory.max": f"{2 * GIB}\n",
            "system.slice/trimrt.service/cpu.max": "200000 100000\n",
            "system.slice/trimrt.service/memory.max": f"{8 * GIB}\n",
        },
        Limits(2.0, 2 * GIB),
    ),
    "version 1": ({"": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n"}, Limits(None, None)),
    "no cgroups": ({}, Limits(None, None)),
    "nonsense": ({"": "0::/\n", "cpu.max": "-", "memory.max": ""}, Limits(None, None)),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_tightest_limit_counts(kind: str, tmp_path: Path) -> None:
    files, expected = FILES[kind]
    for name, content in files.items():
        path = tmp_path / ("proc/self/cgroup" if name == "" else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert limits(tmp_path) == expected


def test_this_process_has_limits_or_none() -> None:
    found = limits()
    assert found.cores is None or found.cores > 0
    assert found.memory is None or found.memory > 0
