"""Measurements: scores, sizes, and the share of the weights that is alive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from models.datasets import DataSplit
from models.evaluation import count_macs, count_parameters, evaluate, live_parameters, predict_logits
from models.networks import Stem, build_network
from models.preprocessing import Preprocessing
from models.training import Images


class BrightestThird(nn.Module):
    """Three classes: which third of the rows is the brightest; ten times surer than not."""

    def __init__(self) -> None:
        super().__init__()
        self.sureness = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.sureness * images.mean(dim=(1, 3)).unflatten(1, (3, -1)).mean(2)


SPEC = Preprocessing(resize=6, height=6, width=6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def bright_thirds(count: int) -> Images:
    targets = np.arange(count) % 3
    pixels = np.zeros((count, 6, 6, 3), np.uint8)
    for row, target in zip(pixels, targets, strict=True):
        row[2 * target : 2 * target + 2] = 255
    return Images(pixels, targets)


def test_score() -> None:
    images = bright_thirds(300)
    targets = images.targets.copy()
    targets[:6] = (targets[:6] + 1) % 3
    score = evaluate(BrightestThird(), images.pixels, targets, SPEC)
    right = math.log(1 + 2 * math.exp(-20))
    assert (score.wrong, score.images, score.accuracy) == (6, 300, 0.98)
    assert score.loss == pytest.approx((6 * (20 + right) + 294 * right) / 300)


def test_logits_see_normalised_pixels_and_keep_the_mode() -> None:
    network = BrightestThird().train()
    logits = predict_logits(network, bright_thirds(3).pixels, SPEC)
    torch.testing.assert_close(logits, 20 * torch.eye(3) - 10)
    assert network.training


def test_resnet18_has_its_published_size() -> None:
    network = build_network("resnet18", 1000)
    assert count_parameters(network) == 11_689_512
    assert count_macs(network, 224, 224) == 1_814_073_344


class TokenFirst(nn.Module):
    """Gives a parameter to a layer, as PiT does with its class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 3))
        self.layer = nn.Linear(3, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(self.token) + self.layer(images.mean(dim=(2, 3)))


def test_macs_of_a_layer_whose_input_is_a_parameter() -> None:
    assert count_macs(TokenFirst().eval(), 6, 6) == 2 * 3 * 5


@pytest.mark.parametrize(
    ("size", "stem", "alive"), [(24, "small", True), (32, "small", True), (32, "standard", False)]
)
def test_dead_weights_are_found(data: DataSplit, size: int, stem: Stem, alive: bool) -> None:
    # 32 pixels under the standard stem leave the last stage one pixel: 8 of its 9 taps see padding.
    spec = Preprocessing(resize=size, height=size, width=size)
    pixels = data.train.subset(np.arange(32), "few").load_pixels(spec)
    torch.manual_seed(0)
    network = build_network("resnet18", 10, stem)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    share = live_parameters(network, pixels, spec)
    assert share > 0.95 if alive else 0.3 < share < 0.45
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
