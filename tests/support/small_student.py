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
_BATCH: Final = 64


def write_checkpoint(folder: Path, data: DataSplit) -> Path:
    """Train a ResNet18 of a quarter of the usual width and save it to `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is slower on two, and another one
    try:
        network = _train(data)
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


def _train(data: DataSplit) -> nn.Module:
    torch.manual_seed(0)
    network = build_network("resnet18", len(data.labels), "small").eval()
    Pruner(network, SPEC, Pruning(round_to=16, steps=1), ratio=0.75).step()
    pixels, targets = data.train.load_pixels(SPEC), torch.from_numpy(data.train.targets)
    images = normalise(to_float(pixels, torch.device("cpu")), SPEC)
    steps = _EPOCHS * (len(images) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for _ in range(_EPOCHS):
        for part in torch.randperm(len(images)).split(_BATCH)[: len(images) // _BATCH]:
            optimizer.zero_grad()
            functional.cross_entropy(network(images[part]), targets[part]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()
