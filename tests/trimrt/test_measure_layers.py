"""`trimrt measure-layers` as a user meets it: real networks, compiled and timed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bare_process import WITHOUT
from click.testing import Result
from narrow_graphs import Layers, narrow_kit, residual
from processes import TRIMRT
from running import wait_until

from models.latency import LatencyPredictor, LatencyTable, read_latency_table

Trimrt = Callable[..., Result]


@pytest.fixture(scope="module")
def kit_of_two_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return narrow_kit(tmp_path_factory.mktemp("kits") / "narrow", residual(width=32, inner=64))


@pytest.fixture(scope="module")
def file(kit_of_two_groups: Path, tmp_path_factory: pytest.TempPathFactory, trimrt: Trimrt) -> Path:
    file = tmp_path_factory.mktemp("tables") / "here.json"
    result = trimrt("measure-layers", kit_of_two_groups, "-p", "fp32", "-o", file)
    assert result.exit_code == 0, result.output
    return file


@pytest.fixture(scope="module")
def table(file: Path) -> LatencyTable:
    return read_latency_table(file)


def test_the_table_says_what_was_measured_where(table: LatencyTable) -> None:
    assert (table.network, table.backend, table.precision, table.batch) == ("small", "openvino", "fp32", 1)
    assert table.machine
    assert table.cores >= 1
    assert table.power is None
    assert table.block in (8, 16, 32)
    assert [(group.name, group.channels, group.layers) for group in table.groups] == [
        ("branch", 32, ("branch", "stem")),
        ("inner", 64, ("inner",)),
    ]
    assert table.pairs == [("branch", "inner")]
    assert table.missing() == []


def test_the_table_foretells_that_more_channels_take_longer(table: LatencyTable) -> None:
    predictor = LatencyPredictor(table)
    assert predictor.predict({}) < predictor.predict({"branch": 32, "inner": 64})


def test_a_finished_table_is_not_measured_again(file: Path, kit_of_two_groups: Path, trimrt: Trimrt) -> None:
    before = file.read_bytes()
    result = trimrt("measure-layers", kit_of_two_groups, "-p", "fp32", "-o", file)
    assert result.exit_code == 0, result.output
    assert file.read_bytes() == before


def test_an_unfinished_table_is_continued(
    table: LatencyTable, kit_of_two_groups: Path, tmp_path: Path, trimrt: Trimrt
) -> None:
    file, half = tmp_path / "half.json", table.timed[: len(table.timed) // 2]
    file.write_text(table.model_copy(update={"timed": half}).model_dump_json(), encoding="utf-8")
    result = trimrt("measure-layers", kit_of_two_groups, "-p", "fp32", "-o", file)
    assert result.exit_code == 0, result.output
    continued = read_latency_table(file)
    assert continued.missing() == []
    assert continued.timed[: len(half)] == half


def test_a_table_of_another_network_is_not_overwritten(file: Path, tmp_path: Path, trimrt: Trimrt) -> None:
    before = file.read_bytes()
    other = narrow_kit(tmp_path / "other", residual(width=16, inner=64))
    result = trimrt("measure-layers", other, "-p", "fp32", "-o", file)
    assert result.exit_code == 1
    assert "of another network, machine, precision or batch; write to another file" in result.output
    assert file.read_bytes() == before


def test_a_network_whose_channels_nothing_can_narrow_is_refused(tmp_path: Path, trimrt: Trimrt) -> None:
    layers = Layers()
    first = layers.convolution("first", "x", 3, 8)
    kit = narrow_kit(tmp_path / "kit", layers.model(layers.convolution("last", first, 8, 8, groups=2), 8))
    result = trimrt("measure-layers", kit, "-p", "fp32", "-o", tmp_path / "table.json")
    assert result.exit_code == 1
    assert "no channels of small can be narrowed" in result.output


def test_a_name_that_nothing_has_is_refused(tmp_path: Path, trimrt: Trimrt) -> None:
    result = trimrt("measure-layers", "resnet19", "-o", tmp_path / "table.json")
    assert result.exit_code == 1
    assert "nor is there such an architecture" in result.output


def test_a_kit_is_measured_without_torch_modelopt_or_onnx(kit_of_two_groups: Path, tmp_path: Path) -> None:
    arguments = ["measure-layers", str(kit_of_two_groups), "-p", "fp32", "-o", str(tmp_path / "table.json")]
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert read_latency_table(tmp_path / "table.json").missing() == []


@pytest.mark.slow
def test_an_architecture_is_measured_in_int8_by_its_name_and_what_was_timed_outlives_an_interruption(
    tmp_path: Path,
) -> None:
    file = tmp_path / "table.json"
    command = [TRIMRT, "measure-layers", "squeezenet1_1", "--image-size", "32", "--classes", "4"]
    measuring = subprocess.Popen([*command, "--target", "openvino", "-o", file], stderr=subprocess.PIPE)
    wait_until(file.exists)
    measuring.send_signal(signal.SIGINT)
    assert b"Traceback" not in measuring.communicate()[1]
    assert measuring.returncode != 0
    table = read_latency_table(file)
    assert (table.network, table.precision) == ("squeezenet1_1", "int8")
    assert table.timed
    assert table.missing()
