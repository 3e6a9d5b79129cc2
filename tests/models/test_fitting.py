"""Fitting a network into a budget: groups of channels, their prices, and what a device says to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from latency_tables import BLOCK, table_of
from torch import nn

from models.evaluation import count_macs, count_parameters
from models.fitting import Fitter, Trial
from models.groups import ChannelGroups
from models.latency import LatencyError, LatencyTable
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.widths import BudgetError

SPEC = Preprocessing(resize=24, height=24, width=24)
CHANNELS = {"0": 64, "3": 128, "6": 64}


@pytest.fixture
def chain() -> nn.Module:
    """Three convolutions in a row, and a linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, 64, 128), (64, 128, 64), strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def milliseconds(widths: Mapping[str, int]) -> float:
    """As kernels take that compute a block of channels at a time."""
    first, second, third = (-(-widths[name] // BLOCK) for name in CHANNELS)
    return 0.1 + 0.05 * first + 0.01 * first * second + 0.01 * second * third


TABLE = table_of(CHANNELS, milliseconds)


class SlowerDevice:
    """Takes half as long again as its table says, beyond what the narrowest network takes."""

    def __init__(self) -> None:
        self.tried: list[float] = []

    def open_table(
        self, network: nn.Module, name: str, spec: Preprocessing, file: Path, other: Path | None
    ) -> LatencyTable:
        return TABLE

    def try_out(self, network: nn.Module, spec: Preprocessing, table: LatencyTable | None) -> Trial:
        least = milliseconds(dict.fromkeys(CHANNELS, BLOCK))
        found = milliseconds(dict(zip(CHANNELS, widths_of(network), strict=True)))
        self.tried.append(least + 1.5 * (found - least))
        return Trial(self.tried[-1], count_parameters(network) / 1e6)


def widths_of(network: nn.Module) -> list[int]:
    return [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [("resnet18", 12), ("mobilenet_v2", 25), ("squeezenet1_1", 25)],
    ids=["residual sums", "depthwise convolutions", "concatenations"],
)
def test_what_fewer_channels_save_is_known_exactly(architecture: str, groups: int) -> None:
    network = build_network(architecture, 10, "small").eval()
    found = ChannelGroups(network, SPEC)
    assert len(found.channels) == groups
    draw = np.random.default_rng(0)
    widths = {name: int(draw.integers(8, channels + 1)) for name, channels in found.channels.items()}
    parameters, macs = count_parameters(network), count_macs(network, 24, 24)
    pruned = copy.deepcopy(network)
    ChannelGroups(pruned, SPEC).prune(widths)
    assert count_parameters(pruned) == parameters - found.saved_parameters(widths)
    assert count_macs(pruned, 24, 24) == macs - found.saved_macs(widths)
    assert ChannelGroups(pruned, SPEC).channels == widths


def test_channels_without_weight_are_worth_nothing_and_go_first(chain: nn.Module) -> None:
    weak = [1, 5, 60]
    with torch.no_grad():
        chain.get_parameter("0.weight")[weak] *= 1e-6
        chain.get_parameter("3.weight")[:, weak] *= 1e-6
    kept = chain.get_parameter("0.weight")[[place for place in range(64) if place not in weak]].clone()
    groups = ChannelGroups(chain, SPEC)
    assert groups.worth()["0"][61:] == pytest.approx(0, abs=1e-9)
    groups.prune({"0": 61})
    assert torch.equal(chain.get_parameter("0.weight"), kept)


def test_another_importance_than_the_weights_squares_decides_what_goes(chain: nn.Module) -> None:
    importance = {name: torch.ones_like(weight) for name, weight in chain.named_parameters()}
    for side in (importance["0.weight"], importance["3.weight"].transpose(0, 1)):
        side[:60] = 0
    kept = chain.get_parameter("0.weight")[60:].clone()
    groups = ChannelGroups(chain, SPEC, importance)
    assert groups.worth()["0"][4:] == pytest.approx(0, abs=1e-9)
    groups.prune({"0": 4})
    assert torch.equal(chain.get_parameter("0.weight"), kept)


def test_what_is_left_of_a_group_becomes_more_precious(chain: nn.Module) -> None:
    for worth in ChannelGroups(chain, SPEC).worth().values():
        assert worth[-1] == pytest.approx(0, abs=1e-9)
        steps = np.diff(worth[1:])
        assert (steps > 0).all()
        assert (np.diff(steps) < 1e-9).all()


def test_a_prediction_that_is_off_is_corrected_by_what_the_device_takes(chain: nn.Module) -> None:
    device = SlowerDevice()
    fitter = Fitter(chain, SPEC, {"latency_ms": 0.5}, 8, TABLE, device)
    fitter.require_possible()
    fit = fitter.fit(chain, fitter.budget, tried=True)
    cost = fit.promise.costs["latency_ms"]
    assert device.tried[0] > 0.5
    assert cost.asked == 0.5
    assert cost.measured is not None
    assert cost.measured == max(ms for ms in device.tried if ms <= 0.5)
    assert cost.predicted == pytest.approx(cost.measured, rel=0.02)
    assert widths_of(chain) == list(CHANNELS.values())
    assert all(width % TABLE.block == 0 for width in fit.widths.values())
    assert str(fit.promise.device) == "1 image on a processor, 2 cores, openvino, int8"


def test_several_budgets_hold_together(chain: nn.Module) -> None:
    budget = {"latency_ms": 0.6, "size_mb": 0.04, "macs": 0.5 * count_macs(chain, 24, 24)}
    fitter = Fitter(chain, SPEC, budget, 8, TABLE, SlowerDevice())
    costs = fitter.fit(chain, budget, tried=True).promise.costs
    assert set(costs) == set(budget)
    assert all(cost.measured is not None and cost.measured <= cost.asked for cost in costs.values())


def test_budgets_on_the_way_fall_from_the_whole_network_to_what_is_asked(chain: nn.Module) -> None:
    fitter = Fitter(chain, SPEC, {"macs": 1e6}, 8, None, None)
    way = [fitter.on_the_way(share)["macs"] for share in (0.0, 0.5, 1.0)]
    macs = count_macs(chain, 24, 24)
    assert way == pytest.approx([macs, (macs * 1e6) ** 0.5, 1e6])


def test_what_no_widths_are_within_is_refused_with_the_least(chain: nn.Module) -> None:
    fitter = Fitter(chain, SPEC, {"latency_ms": 0.1, "macs": 1e9}, 8, TABLE, None)
    with pytest.raises(BudgetError, match=r"^0\.1 ms cannot be met: the narrowest network takes 0\.17$"):
        fitter.require_possible()


def test_a_table_of_the_same_network_at_another_input_size_is_refused(chain: nn.Module) -> None:
    other = TABLE.model_copy(update={"macs": count_macs(chain, 48, 48)})
    with pytest.raises(LatencyError, match="its input size, stem or number of classes is another"):
        Fitter(chain, SPEC, {"latency_ms": 1}, 8, other, None)
    same = TABLE.model_copy(update={"macs": count_macs(chain, 24, 24)})
    Fitter(chain, SPEC, {"latency_ms": 1}, 8, same, None)


def test_a_table_of_another_network_is_refused(chain: nn.Module) -> None:
    other = table_of(CHANNELS | {"3": 96}, milliseconds)
    with pytest.raises(LatencyError, match=r"of another network \(small\): here 3 has 128 channels"):
        Fitter(chain, SPEC, {"latency_ms": 1}, 8, other, None)
