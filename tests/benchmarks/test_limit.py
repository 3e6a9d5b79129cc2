"""The loop without a server does the whole work that a server would, whenever it is told to."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click
import pytest
from tiny_engine import write_package

from benchmarks.limit import best_for_latency, best_for_throughput, work
from benchmarks.load import cpu_milliseconds, merge
from benchmarks.photos import photographs, store
from benchmarks.unserved import unserved
from models.cores import cores
from models.preprocessing import DamagedImageError
from runtime.tuning import Setting
from trimrt.bench.loop import open_loop
from trimrt.bench.tuning import throughput

ONE = Setting(slots=1, threads=1, batch=1)
SEVERAL = Setting(slots=2, threads=2, batch=4)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package"))


@pytest.mark.parametrize("setting", [ONE, SEVERAL], ids=str)
def test_the_loop_works_in_rounds(package: Path, setting: Setting) -> None:
    with open_loop(package, setting, photographs()) as loop:
        rounds = [work(loop, 0.2) for _ in range(2)]

    for one in rounds:
        assert one.requests % setting.batch == 0
        assert sum(count for _, count in one.latencies) == one.requests > 0
        assert one.seconds >= 0.2
        # Each slot is at work all the time.
        busy = sum(microseconds * count for microseconds, count in one.latencies) / 1e6 / setting.batch
        assert busy == pytest.approx(setting.slots * one.seconds, rel=0.5)
    assert 0 < cpu_milliseconds(rounds) * merge(rounds).throughput / 1000 <= setting.slots + setting.threads


def test_a_damaged_photograph_is_not_skipped(package: Path) -> None:
    damaged = photographs()[0][:1000]

    with pytest.raises(DamagedImageError, match="damaged"):
        throughput(package, ONE, [damaged], seconds=0.1)
    with open_loop(package, ONE, [damaged]) as loop, pytest.raises(DamagedImageError, match="damaged"):
        work(loop, 0.1)


def test_larger_photographs_take_longer(package: Path) -> None:
    medians = []
    for size in (0.1, 3):
        with open_loop(package, ONE, photographs(size)) as loop:
            medians.append(merge([work(loop, 0.3)]).p50)

    small, large = medians
    assert large > 2 * small > 0


def test_no_slow_moment_chooses_the_setting(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours slow the machine during the first trial of every setting but one, for batches of one."""
    tried: set[Setting] = set()

    def trial(_package: Path, setting: Setting, _files: list[bytes], _seconds: float) -> float:
        slowed = bool(tried) and setting not in tried
        tried.add(setting)
        return setting.batch * (0.01 if slowed else 1.0)

    monkeypatch.setattr("trimrt.bench.tuning.throughput", trial)

    assert best_for_throughput(package, []).batch > 1


def test_one_image_after_the_other_gets_every_thread(package: Path) -> None:
    setting = best_for_latency(package, photographs(0.05))

    assert (setting.slots, setting.threads, setting.batch) == (1, cores(), 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return store("small", photographs(0.05), tmp_path_factory.mktemp("photographs"))


@pytest.mark.slow
def test_its_process_works_when_told_to_until_it_ends(
    package: Path, files: list[Path], tmp_path: Path
) -> None:
    with unserved(Path(sys.executable), package, files, tmp_path / "log") as loop:
        busy, alone, again = (loop.round(what, 0.2) for what in ("throughput", "latency", "throughput"))
        batch = loop.settings.throughput.batch
        assert busy.requests % batch == again.requests % batch == 0
        assert alone.requests > 0

        os.kill(loop._process.pid, signal.SIGKILL)
        loop._process.wait()
        with pytest.raises(click.ClickException, match=r"benchmarks\.limit failed; see .*log"):
            loop.round("latency", 0.1)


def test_an_engine_that_does_not_load_is_told(files: list[Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(click.ClickException, match="failed"),
        unserved(Path(sys.executable), tmp_path / "nothing", files, log),
    ):
        pass

    assert "EngineError" in log.read_text()
