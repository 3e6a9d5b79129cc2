"""Networks: any torchvision classifier, a stem for small images, and weights brought along."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from models.networks import (
    NetworkError,
    architectures,
    build_network,
    build_planned_network,
    channel_plan,
    classifier_head,
    load_pretrained,
)

TINY = ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "regnet_x_400mf")


@pytest.mark.parametrize("architecture", ["resnet18", *TINY])
def test_small_stem_keeps_the_resolution(architecture: str) -> None:
    network = build_network(architecture, 7, "small").eval()
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("architecture", ["resnet50", *TINY])
def test_head_is_the_layer_of_the_classes(architecture: str) -> None:
    _, head = classifier_head(build_network(architecture, 7))
    assert 7 in (getattr(head, "out_features", None), getattr(head, "out_channels", None))


def test_residual_branches_start_at_zero() -> None:
    network = build_network("resnet18", 7)
    assert not network.get_parameter("layer3.1.bn2.weight").any()
    assert network.get_parameter("layer3.1.bn1.weight").all()


@pytest.mark.parametrize("architecture", ["vit_b_16", "convnext_tiny", "swin_t"])
def test_patches_have_no_small_stem(architecture: str) -> None:
    with torch.device("meta"), pytest.raises(NetworkError, match=r"--image-stem standard"):
        build_network(architecture, 7, "small")


def test_unknown_architecture_lists_the_known() -> None:
    assert {"resnet18", "efficientnet_b0", "vit_b_16"} < set(architectures())
    with pytest.raises(NetworkError, match=r"resnet20.*torchvision has: .*resnet18"):
        build_network("resnet20", 7)


def test_plan_of_an_unpruned_network_is_none() -> None:
    assert channel_plan(build_network("resnet18", 7, "small"), "resnet18", 7, "small") is None


def test_plan_takes_any_sizes() -> None:
    plan = {"layer4.1.conv1": {"out_channels": 5}, "layer4.1.bn1": {"num_features": 5}}
    plan["layer4.1.conv2"] = {"in_channels": 5}
    network = build_planned_network("resnet18", 7, "small", plan)
    assert network.get_parameter("layer4.1.conv1.weight").shape == (5, 512, 3, 3)
    assert network.get_parameter("layer4.1.conv2.weight").shape == (512, 5, 3, 3)
    assert network.get_buffer("layer4.1.bn1.running_var").shape == (5,)
    assert channel_plan(network, "resnet18", 7, "small") == plan


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(1)
    return build_network("shufflenet_v2_x0_5", 10)


class TestPretrained:
    @pytest.fixture
    def network(self) -> nn.Module:
        torch.manual_seed(2)
        return build_network("shufflenet_v2_x0_5", 7, "small")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_all_that_fits_is_taken_and_the_rest_named(
        self, tmp_path: Path, source: nn.Module, network: nn.Module, suffix: str
    ) -> None:
        file = tmp_path / f"weights{suffix}"
        (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), file)
        assert load_pretrained(network, file) == ["fc.weight", "fc.bias"]
        for name, tensor in network.state_dict().items():
            if name not in ("fc.weight", "fc.bias"):
                assert torch.equal(tensor, source.state_dict()[name]), name

    def test_a_first_convolution_of_another_shape_stays_random(self, tmp_path: Path) -> None:
        torch.save(build_network("resnet18", 7).state_dict(), tmp_path / "weights.pth")
        network = build_network("resnet18", 7, "small")
        assert load_pretrained(network, tmp_path / "weights.pth") == ["conv1.weight"]

    def test_another_architecture_is_refused(self, tmp_path: Path, source: nn.Module) -> None:
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        with pytest.raises(NetworkError, match="does not fit this architecture"):
            load_pretrained(build_network("squeezenet1_1", 10), tmp_path / "weights.pth")

    def test_files_that_are_not_weights(self, tmp_path: Path, source: nn.Module, network: nn.Module) -> None:
        with pytest.raises(NetworkError, match="cannot read weights"):
            load_pretrained(network, tmp_path / "nothing.pth")
        torch.save(source, tmp_path / "module.pth")  # a pickled module would run code
        with pytest.raises(NetworkError, match="cannot read weights"):
            load_pretrained(network, tmp_path / "module.pth")
        torch.save({"epoch": 3}, tmp_path / "state.pth")
        with pytest.raises(NetworkError, match="not a state dict"):
            load_pretrained(network, tmp_path / "state.pth")
