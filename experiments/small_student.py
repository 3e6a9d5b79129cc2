"""Students so small that they are trained in seconds: handwritten digits of 24x24 pixels."""

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
_PRUNING: Final = Pruning(round_to=16, steps=1)
_BATCH: Final = 64


def pruned_resnet18(data: DataSplit, *, ratio: float, epochs: int) -> nn.Module:
    """A ResNet18 that lost `ratio` of its channels before it was trained; always the same one."""
    torch.manual_seed(0)
    network = build_network("resnet18", len(data.labels), "small").eval()
    Pruner(network, SPEC, _PRUNING, ratio=ratio).step()
    return train(network, data, epochs)


def train(network: nn.Module, data: DataSplit, epochs: int) -> nn.Module:
    """The network, trained on the true labels."""
    pixels, targets = data.train.load_pixels(SPEC), torch.from_numpy(data.train.targets)
    images = normalise(to_float(pixels, torch.device("cpu")), SPEC)
    steps = epochs * (len(images) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(images)), _BATCH)[: len(images) // _BATCH]:
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(images[part]), targets[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def save(folder: Path, network: nn.Module, data: DataSplit, *, name: str, command: str) -> Path:
    """Write the checkpoint, measured on the validation images."""
    found = evaluate(network, data.validation.load_pixels(SPEC), data.validation.targets, SPEC)
    card = Card(
        name=name,
        role="pruned",
        architecture="resnet18",
        stem="small",
        labels=list(data.labels),
        preprocessing=SPEC,
        dataset=data.card(),
        metrics=Metrics(
            accuracy=found.accuracy,
            validation_accuracy=found.accuracy,
            loss=found.loss,
            wrong=found.wrong,
            images=found.images,
            parameters=count_parameters(network),
            macs=count_macs(network, SPEC.height, SPEC.width),
            live_parameters=1,
        ),
        seed=0,
        recipe={},
        command=command,
        versions={"torch": torch.__version__},
    )
    save_checkpoint(folder, network, card)
    return folder
