"""The device that networks are fitted to: this machine is measured, and engines are tried out on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from builder import FittingDevice
from models.evaluation import count_macs
from models.fitting import Fitter
from models.latency import LatencyError, LatencyTable, read_latency_table
from models.preprocessing import Preprocessing

SPEC = Preprocessing(resize=16, height=16, width=16)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Two convolutions, of which each may be narrowed, and a linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)).eval()


@pytest.fixture(scope="module")
def table(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[LatencyTable, Path]:
    file = tmp_path_factory.mktemp("tables") / "run" / "latency.json"
    return FittingDevice().open_table(network, "timm:small", SPEC, file), file


def test_without_a_table_this_machine_is_measured(table: tuple[LatencyTable, Path]) -> None:
    assert [(group.name, group.channels) for group in table[0].groups] == [("0", 48), ("2", 48)]
    assert (table[0].network, table[0].precision, table[0].batch) == ("timm-small", "int8", 1)
    assert table[0].missing() == []


def test_a_table_that_is_there_is_not_measured_again(
    network: nn.Module, table: tuple[LatencyTable, Path]
) -> None:
    for device in (FittingDevice(), FittingDevice(table[1])):
        assert device.open_table(network, "timm:small", SPEC, table[1]) == table[0]


@pytest.mark.parametrize("place", ["its own", "another run's"])
def test_a_table_of_another_input_size_is_measured_again(
    place: str, network: nn.Module, table: tuple[LatencyTable, Path], tmp_path: Path
) -> None:
    there = tmp_path / "there.json"
    shutil.copy(table[1], there)
    file = there if place == "its own" else tmp_path / "latency.json"
    larger = Preprocessing(resize=32, height=32, width=32)
    found = FittingDevice().open_table(network, "timm:small", larger, file, there)
    assert found.missing() == []
    assert (found.macs, table[0].macs) == (count_macs(network, 32, 32), count_macs(network, 16, 16))
    assert read_latency_table(file) == found


def test_the_table_of_another_run_is_taken_over(
    network: nn.Module, table: tuple[LatencyTable, Path], tmp_path: Path
) -> None:
    file = tmp_path / "run" / "latency.json"
    assert FittingDevice().open_table(network, "timm:small", SPEC, file, table[1]) == table[0]
    assert file.read_bytes() == table[1].read_bytes()


def test_a_network_is_timed_where_its_table_was_measured(
    network: nn.Module, table: tuple[LatencyTable, Path]
) -> None:
    trial = FittingDevice().try_out(network, SPEC, table[0])
    assert trial.latency_ms is not None
    assert trial.latency_ms > 0
    assert 0.022 < trial.size_mb < 0.03  # 22,224 weights, and a bias and a scale for each channel


def test_a_network_for_another_machine_is_weighed_but_not_timed(
    network: nn.Module, table: tuple[LatencyTable, Path]
) -> None:
    other = table[0].model_copy(update={"machine": "a board"})
    trial = FittingDevice().try_out(network, SPEC, other)
    assert trial.latency_ms is None
    assert trial.size_mb > 0.022


def test_the_widths_that_are_found_have_been_measured_here(
    network: nn.Module, table: tuple[LatencyTable, Path]
) -> None:
    fitter = Fitter(network, SPEC, {"latency_ms": 100.0}, 16, table[0], FittingDevice())
    cost = fitter.fit(network, fitter.budget, tried=True).promise.costs["latency_ms"]
    assert cost.measured is not None
    assert cost.measured < 100


def test_what_is_no_table_is_refused(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LatencyError, match="`trimrt measure-layers` writes"):
        FittingDevice(tmp_path / "none.json").open_table(network, "small", SPEC, tmp_path / "latency.json")
