"""The build kit of `trimrt selftest`: `python -m experiments.selftest_kit` makes it.

A ResNet18 with a tenth of the channels, for handwritten digits of 24x24 pixels. It takes seconds; what comes
out is committed, so that a device needs neither torch nor ModelOpt for the test of itself.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from builder import PrepareOptions, make_kit
from builder.kit import KIT_NAME, VERIFICATION_NAME, KitManifest, open_kit, write_verification
from models.card import Card, Metrics
from models.checkpoint import save_checkpoint
from models.datasets import DataSplit, open_dataset
from models.evaluation import count_macs, count_parameters, evaluate, normalise, to_float
from models.files import replace_folder
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.pruning import Pruner
from models.recipe import Pruning
from runtime.manifest import sha256_of
from trimrt.selftest.checks import KIT

_SPEC: Final = Preprocessing(resize=24, height=24, width=24, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
_PRUNING: Final = Pruning(ratio=0.9, round_to=16, steps=1)
_EPOCHS: Final = 12
_BATCH: Final = 64
_IMAGES: Final = 256  # of the validation images, unshifted
_COMMAND: Final = "python -m experiments.selftest_kit"


def main() -> None:
    """Write the kit where `trimrt selftest` finds it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a network is slower on several, and another one
    data = open_dataset("digits")
    with tempfile.TemporaryDirectory() as name, replace_folder(KIT) as folder:
        checkpoint = _checkpoint(Path(name) / "selftest", data)
        options = PrepareOptions(calibration="entropy", name="selftest")
        make_kit(checkpoint, Path(name) / "kit", options, precisions=("fp16", "int8"))
        kit = open_kit(Path(name) / "kit")
        for graph in kit.manifest.graphs:
            (folder / graph.file).write_bytes((kit.path / graph.file).read_bytes())
        images = kit.verification
        few = min(_IMAGES, images.originals)
        parts = {array: getattr(images, array)[:few] for array in ("pixels", "targets", "logits")}
        write_verification(folder / VERIFICATION_NAME, replace(images, originals=few, **parts))
        _write_manifest(folder, kit.manifest, few)
    print(f"{KIT}: {sum(file.stat().st_size for file in KIT.iterdir()):,} bytes")


def _write_manifest(folder: Path, manifest: KitManifest, originals: int) -> None:
    """The kit's own, of fewer images."""
    changed = {
        "verification_sha256": sha256_of(folder / VERIFICATION_NAME),
        "verification_originals": originals,
        "command": _COMMAND,
        "student": manifest.student.model_copy(update={"source": None}),
    }
    text = json.dumps(manifest.model_copy(update=changed).model_dump(mode="json"), indent=2)
    (folder / KIT_NAME).write_text(text + "\n", encoding="utf-8")


def _checkpoint(folder: Path, data: DataSplit) -> Path:
    network = build_network("resnet18", len(data.labels), "small").eval()
    Pruner(network, _SPEC, _PRUNING, ratio=_PRUNING.ratio).step()
    _train(network, data)
    found = evaluate(network, data.validation.load_pixels(_SPEC), data.validation.targets, _SPEC)
    metrics = Metrics(
        accuracy=found.accuracy,
        validation_accuracy=found.accuracy,
        loss=found.loss,
        wrong=found.wrong,
        images=found.images,
        parameters=count_parameters(network),
        macs=count_macs(network, _SPEC.height, _SPEC.width),
        live_parameters=1,
    )
    card = Card(
        name="selftest",
        role="pruned",
        architecture="resnet18",
        stem="small",
        labels=list(data.labels),
        preprocessing=_SPEC,
        dataset=data.card(),
        metrics=metrics,
        seed=0,
        recipe={},
        command=_COMMAND,
        versions={"torch": torch.__version__},
    )
    save_checkpoint(folder, network, card)
    return folder


def _train(network: nn.Module, data: DataSplit) -> None:
    pixels, targets = data.train.load_pixels(_SPEC), torch.from_numpy(data.train.targets)
    images = normalise(to_float(pixels, torch.device("cpu")), _SPEC)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    steps = _EPOCHS * (len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for _ in range(_EPOCHS):
        for part in torch.split(torch.randperm(len(images)), _BATCH)[: len(images) // _BATCH]:
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(images[part]), targets[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval()


if __name__ == "__main__":
    main()
