"""The loop without a server does the whole work that a server would."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_engine import write_package

from benchmarks.limit import latency
from benchmarks.photos import photographs
from server.engines.tuned import Setting
from server.tuning import throughput

ONE = Setting(slots=1, threads=1, batch=1)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package"))


@pytest.mark.parametrize("setting", [ONE, Setting(slots=2, threads=2, batch=4)], ids=str)
def test_throughput_and_cost_agree_with_each_other(package: Path, setting: Setting) -> None:
    images, cpu_ms = throughput(package, setting, photographs(), seconds=0.3)

    assert images > 0
    # Threads that are at work all the time; OpenVINO may add its own.
    assert 0 < images * cpu_ms / 1000 <= setting.slots + setting.threads


def test_a_damaged_photograph_is_not_skipped(package: Path) -> None:
    with pytest.raises(ValueError, match="damaged"):
        throughput(package, ONE, [photographs()[0][:1000]], seconds=0.1)


def test_larger_photographs_take_longer(package: Path) -> None:
    small, large = (latency(package, photographs(size), 1, seconds=0.3) for size in (0.1, 3))

    assert large > 2 * small > 0
