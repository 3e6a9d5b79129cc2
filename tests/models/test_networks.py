"""Networks: classifiers of torchvision and timm, a stem for small images, and sizes that can be replayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.networks import (
    NetworkError,
    architectures,
    build_network,
    build_planned_network,
    channel_plan,
    classifier_head,
    skeleton,
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


def test_an_unknown_architecture_is_refused_with_one_like_it() -> None:
    assert {"resnet18", "efficientnet_b0", "vit_b_16"} < set(architectures())
    with pytest.raises(
        NetworkError, match=r"torchvision has no classifier 'resnet19' .did you mean resnet18"
    ):
        build_network("resnet19", 7)
    with pytest.raises(NetworkError, match=r"timm has no classifier 'resnet18x' .did you mean resnet18"):
        build_network("timm:resnet18x", 7)


@pytest.mark.parametrize(
    "architecture", ["resnet18", "regnet_x_400mf", "swin_t", "timm:levit_128s", "timm:test_vit2"]
)
def test_a_skeleton_can_be_filled(architecture: str) -> None:
    """RegNet's constructor computes with tensors; LeViT has buffers that are no part of its state."""
    torch.manual_seed(0)
    network = build_network(architecture, 7).eval()
    rebuilt = build_planned_network(architecture, 7, "standard", None)
    rebuilt.load_state_dict(network.state_dict(), assign=True)
    spec = getattr(network, "pretrained_cfg", {}).get("input_size", (3, 64, 64))
    images = torch.rand(1, *spec)
    assert torch.equal(rebuilt.eval()(images), network(images))


def test_a_skeleton_takes_nothing_from_the_random_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    skeleton(lambda: build_network("vit_b_16", 7))
    assert torch.equal(torch.rand(1), expected)


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
