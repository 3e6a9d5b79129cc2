"""Settings found by trying are kept with the engine, and used where they were found."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_engine import write_package

from models.cores import cores
from runtime.engine import Options
from runtime.loading import load_engine
from runtime.tuning import TUNING_NAME, Setting, Trial, Tuning, this_processor
from trimrt.bench.tuning import sample_photographs, tune
from trimrt.cli import main

UNUSUAL = Setting(slots=3, threads=3, batch=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def package(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "engine")


def keep(package: Path, *, processor: str | None = None, number: int | None = None) -> None:
    tuning = Tuning(
        processor=processor or this_processor(),
        cores=number or cores(),
        setting=UNUSUAL,
        trials=[Trial(setting=UNUSUAL, throughput=1)],
    )
    (package / TUNING_NAME).write_text(tuning.model_dump_json())


def used(package: Path, options: Options | None = None) -> tuple[int, int]:
    engine = load_engine(package, options)
    return engine.slots, engine.best_batch


def test_the_smallest_batch_near_the_best_throughput_is_kept_and_used(package: Path) -> None:
    shares: list[float] = []
    tuning = tune(package, sample_photographs(), seconds=0.05, progress=shares.append)

    rates = {trial.setting: trial.throughput for trial in tuning.trials}
    best = tuning.setting
    rivals = [setting for setting in rates if setting.slots == best.slots and setting.pinning == best.pinning]
    assert rates[best] >= 0.97 * max(rates[setting] for setting in rivals)
    assert all(rates[s] < 0.97 * max(rates.values()) for s in rivals if s.batch < best.batch)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert used(package) == (best.slots, best.batch)
    assert Tuning.model_validate_json((package / TUNING_NAME).read_text()) == tuning


def test_a_tuning_is_what_options_leave_open(package: Path) -> None:
    keep(package)
    assert used(package) == (3, 2)
    assert used(package, Options(slots=1, threads=1)) == (1, 8)
    assert used(package, Options(threads=1)) == (1, 8)


def test_another_machines_tuning_is_not_used(package: Path) -> None:
    plain = used(package)
    for processor, number in (("another processor", None), (None, cores() + 1)):
        keep(package, processor=processor, number=number)
        assert used(package) == plain


@pytest.mark.parametrize("content", ["", "{", "[]", '{"processor": 1}', "\xff"])
def test_a_damaged_tuning_is_said_and_not_used(
    package: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = used(package)
    (package / TUNING_NAME).write_text(content, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        assert used(package) == plain
    assert "trimrt bench --tune" in caplog.text


def test_the_command_shows_every_trial(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(sample_photographs()[0])
    monkeypatch.setattr("trimrt.bench.tuning.TRIAL_SECONDS", 0.05)

    result = CliRunner().invoke(main, ["bench", "--tune", "--photo", str(photo), str(package)])

    assert result.exit_code == 0, result.output
    trials = json.loads((package / TUNING_NAME).read_text())["trials"]
    assert len([line for line in result.output.splitlines() if " no " in line or " yes " in line]) == len(
        trials
    )
    assert result.output.count("chosen") == 1


def test_a_photograph_that_is_none_is_refused(package: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"no image")

    result = CliRunner().invoke(main, ["bench", "--tune", "--photo", str(photo), str(package)])

    assert result.exit_code == 1
    assert "photo.jpg: not an image" in result.output.replace("\n", "")
    assert not (package / TUNING_NAME).exists()
