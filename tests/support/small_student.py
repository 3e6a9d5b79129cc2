"""A real student, small enough to be trained in seconds: handwritten digits, 24x24 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import nn

from experiments.small_student import SPEC, pruned_resnet18, save, train
from models.datasets import DataSplit

__all__ = ["SPEC", "depthwise_network", "write_checkpoint"]

_DEPTHWISE_EPOCHS: Final = 12  # after fewer, too many images lie between two classes


def write_checkpoint(folder: Path, data: DataSplit) -> Path:
    """Train a ResNet18 of a quarter of the usual width and save it to `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is slower on two, and another one
    try:
        network = pruned_resnet18(data, ratio=0.75, epochs=5)
    finally:
        torch.set_num_threads(threads)
    return save(folder, network, data, name="tiny-digits", command="tests/support/small_student.py")


def depthwise_network(data: DataSplit) -> nn.Module:
    """A trained network of MobileNet's inverted residuals: depthwise convolutions, and sums without ReLU."""
    torch.manual_seed(0)
    blocks = [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)]
    network = nn.Sequential(
        *_norm_relu6(nn.Conv2d(3, 16, 3, 2, 1, bias=False)),
        *(_InvertedResidual(*block) for block in blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, len(data.labels)),
    )
    return train(network, data, _DEPTHWISE_EPOCHS)


def _norm_relu6(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU6()]


class _InvertedResidual(nn.Module):
    def __init__(self, width: int, output: int, stride: int) -> None:
        super().__init__()
        inner = 4 * width
        self.is_sum = width == output and stride == 1
        self.layers = nn.Sequential(
            *_norm_relu6(nn.Conv2d(width, inner, 1, bias=False)),
            *_norm_relu6(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)),
            nn.Conv2d(inner, output, 1, bias=False),
            nn.BatchNorm2d(output),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` itself is added where the sizes agree."""
        return x + self.layers(x) if self.is_sum else self.layers(x)
