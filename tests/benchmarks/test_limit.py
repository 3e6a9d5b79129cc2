"""The loop without a server does the whole work that a server would."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_engine import write_package

from benchmarks.limit import Setting, latency, throughput
from benchmarks.photos import photographs


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package"))


@pytest.mark.parametrize("setting", [Setting(1, 1, 1), Setting(2, 2, 4)], ids=str)
def test_throughput_and_cost_agree_with_each_other(package: Path, setting: Setting) -> None:
    images, cpu_ms = throughput(package, photographs(), setting, seconds=0.3)

    assert images > 0
    # Threads that are at work all the time; OpenVINO may add its own.
    assert 0 < images * cpu_ms / 1000 <= setting.slots + setting.threads


def test_a_damaged_photograph_is_not_skipped(package: Path) -> None:
    with pytest.raises(ValueError, match="damaged"):
        throughput(package, [photographs()[0][:1000]], Setting(1, 1, 1), seconds=0.1)


def test_larger_photographs_take_longer(package: Path) -> None:
    small, large = (latency(package, photographs(size), 1, seconds=0.3) for size in (0.1, 3))

    assert large > 2 * small > 0
