"""Pruning: the weakest channels go, counts stay aligned, targets are met, and no layer disappears."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.evaluation import count_macs, count_parameters
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.pruning import Pruner, PruningError, find_ratio
from models.recipe import PRESETS, Pruning, make_recipe


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet18", 10, "small").eval()


SPEC = Preprocessing(resize=24, height=24, width=24)


def prune(network: nn.Module, settings: Pruning) -> nn.Module:
    network = copy.deepcopy(network)
    pruner = Pruner(network, SPEC, settings, settings.ratio)
    for _ in range(settings.steps):
        pruner.step()
    return network


def widths(network: nn.Module) -> list[int]:
    return [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("preset", "parameters"), [("report", 9_018_358), ("aligned", 8_517_658), ("aggressive", 701_466)]
)
def test_presets_have_the_sizes_that_they_promise(student: nn.Module, preset: str, parameters: int) -> None:
    assert preset in PRESETS
    pruned = prune(student, make_recipe(preset=preset).pruning)
    assert count_parameters(pruned) == parameters
    assert pruned(torch.rand(1, 3, 24, 24)).shape == (1, 10)


def test_default_takes_at_least_23_percent_of_the_parameters(student: nn.Module) -> None:
    assert count_parameters(prune(student, Pruning())) <= 0.77 * count_parameters(student)


@pytest.mark.parametrize("round_to", [8, 16, 32])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_channel_counts_are_multiples(student: nn.Module, scope: str, round_to: int) -> None:
    settings = Pruning.model_validate({"ratio": 0.4, "round_to": round_to, "scope": scope})
    assert all(width % round_to == 0 for width in widths(prune(student, settings)))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_extreme_ratios_leave_every_layer_one_multiple(student: nn.Module, scope: str) -> None:
    settings = Pruning.model_validate({"ratio": 0.98, "round_to": 8, "scope": scope})
    pruned = prune(student, settings)
    assert min(widths(pruned)) == 8
    assert count_parameters(pruned) < 0.1 * count_parameters(student)


def test_steps_end_where_one_shot_ends(student: nn.Module) -> None:
    one, three = (prune(student, Pruning(ratio=0.5, steps=steps)) for steps in (1, 3))
    assert widths(one) == widths(three)


def test_the_weakest_channels_go(student: nn.Module) -> None:
    network = copy.deepcopy(student)
    weak = [0, 3, 7, 20, 21, 22, 40, 63]
    with torch.no_grad():
        # Inside a residual block, where no other layer has a say.
        for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
            network.get_parameter(f"layer1.0.{name}")[weak] *= 1e-3
        network.get_parameter("layer1.0.conv2.weight")[:, weak] *= 1e-3
    strong = [channel for channel in range(64) if channel not in weak]
    expected = network.get_parameter("layer1.0.bn1.weight")[strong].clone()
    kept = network.get_parameter("layer1.0.conv1.weight")[strong].norm(dim=(2, 3)).sum(1)
    pruned = prune(network, Pruning(ratio=8 / 64, round_to=1))
    assert torch.equal(pruned.get_parameter("layer1.0.bn1.weight"), expected)
    # The inputs lose channels too, so only the order of what is left can be compared.
    left = pruned.get_parameter("layer1.0.conv1.weight").norm(dim=(2, 3)).sum(1)
    assert left.shape == kept.shape
    assert bool((left <= kept).all())


class TestTarget:
    def test_parameters(self, student: nn.Module) -> None:
        settings = Pruning(round_to=8)
        ratio = find_ratio(student, SPEC, settings, count_parameters, 2_000_000)
        assert count_parameters(prune(student, settings.model_copy(update={"ratio": ratio}))) <= 2_000_000
        gentler = prune(student, settings.model_copy(update={"ratio": ratio - 0.002}))
        assert count_parameters(gentler) > 2_000_000

    def test_share_of_the_macs(self, student: nn.Module) -> None:
        def measure(network: nn.Module) -> int:
            return count_macs(network, 24, 24)

        settings = Pruning(round_to=1)
        ratio = find_ratio(student, SPEC, settings, measure, 0.7)
        share = measure(prune(student, settings.model_copy(update={"ratio": ratio}))) / measure(student)
        assert 0.68 < share <= 0.7

    def test_already_met(self, student: nn.Module) -> None:
        assert find_ratio(student, SPEC, Pruning(round_to=1), count_parameters, 1e9) == 0

    def test_out_of_reach(self, student: nn.Module) -> None:
        with pytest.raises(PruningError, match="cannot be reached"):
            find_ratio(student, SPEC, Pruning(round_to=8), count_parameters, 100)
