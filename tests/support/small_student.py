"""A real student, small enough to be trained in seconds: handwritten digits, 24x24 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from models.card import Card, Metrics
from models.checkpoint import save_checkpoint
from models.datasets import DataSplit
from models.evaluation import count_macs, count_parameters, evaluate, normalise, to_float
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.pruning import Pruner
from models.recipe import Pruning

SPEC: Final = Preprocessing(resize=24, height=24, width=24, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
_EPOCHS: Final = 5
_DEPTHWISE_EPOCHS: Final = 12  # after fewer, too many images lie between two classes
_BATCH: Final = 64


def write_checkpoint(folder: Path, data: DataSplit) -> Path:
    """Train a ResNet18 of a quarter of the usual width and save it to `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is slower on two, and another one
    try:
        network = _student(data)
    finally:
        torch.set_num_threads(threads)
    validation = evaluate(network, data.validation.load_pixels(SPEC), data.validation.targets, SPEC)
    card = Card(
        name="tiny-digits",
        role="pruned",
        architecture="resnet18",
        stem="small",
        labels=list(data.labels),
        preprocessing=SPEC,
        dataset=data.card(),
        metrics=Metrics(
            accuracy=validation.accuracy,
            validation_accuracy=validation.accuracy,
            loss=validation.loss,
            wrong=validation.wrong,
            images=validation.images,
            parameters=count_parameters(network),
            macs=count_macs(network, SPEC.height, SPEC.width),
            live_parameters=1,
        ),
        seed=0,
        recipe={},
        command="tests/support/small_student.py",
        versions={"torch": torch.__version__},
    )
    save_checkpoint(folder, network, card)
    return folder


def depthwise_network(data: DataSplit) -> nn.Module:
    """A trained network of MobileNet's inverted residuals: depthwise convolutions, and sums without ReLU."""
    torch.manual_seed(0)
    blocks = [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)]
    network = nn.Sequential(
        *_norm_relu6(nn.Conv2d(3, 16, 3, 1, 1, bias=False)),
        *(_InvertedResidual(*block) for block in blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, len(data.labels)),
    )
    return _train(network, data, _DEPTHWISE_EPOCHS)


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


def _student(data: DataSplit) -> nn.Module:
    torch.manual_seed(0)
    network = build_network("resnet18", len(data.labels), "small").eval()
    Pruner(network, SPEC, Pruning(round_to=16, steps=1), ratio=0.75).step()
    return _train(network, data)


def _train(network: nn.Module, data: DataSplit, epochs: int = _EPOCHS) -> nn.Module:
    pixels, targets = data.train.load_pixels(SPEC), torch.from_numpy(data.train.targets)
    images = normalise(to_float(pixels, torch.device("cpu")), SPEC)
    steps = epochs * (len(images) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(_BATCH)[: len(images) // _BATCH]:
            optimizer.zero_grad()
            functional.cross_entropy(network(images[part]), targets[part]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()
