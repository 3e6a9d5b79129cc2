"""Training a network on augmented images: resumable, and the same to the bit with the same seed."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from models.augmentation import random_affines, transform
from models.evaluation import Score, evaluate, normalise, to_float
from models.files import replace_file
from models.preprocessing import Pixels, Preprocessing
from models.recipe import Augmentation, Training, TrainingPrecision

_WARM_UP_SHARE: Final = 0.2
SAVE_INTERVAL_S: Final = 30.0


class Objective(Protocol):
    """What a network is asked to learn from an epoch's images."""

    def affines(self, epoch: int) -> Tensor:
        """Augmentation of all images in `epoch`: shape (N, 2, 3), for `models.augmentation.transform`."""

    def loss(self, logits: Tensor, images: Tensor, epoch: int) -> Tensor:
        """Mean loss of the `logits` (n, classes) of the images numbered `images` (n,)."""


@dataclass(frozen=True)
class TrueLabels:
    """Cross-entropy with the true classes, `targets` of shape (N,), on views drawn again in each epoch."""

    targets: Tensor
    limits: Augmentation
    seed: int

    def affines(self, epoch: int) -> Tensor:
        """Transformations of all images in `epoch`, shape (N, 2, 3)."""
        return random_affines(len(self.targets), self.limits, derive_seed(self.seed, f"augmentation {epoch}"))

    def loss(self, logits: Tensor, images: Tensor, epoch: int) -> Tensor:
        """Cross-entropy of the `logits` of the images numbered `images`."""
        return functional.cross_entropy(logits, self.targets[images].to(logits.device))


@dataclass(frozen=True)
class Images:
    """Pixels, `uint8` of shape (N, H, W, 3), with class indices of shape (N,)."""

    pixels: Pixels
    targets: NDArray[np.int64]


def derive_seed(seed: int, purpose: str) -> int:
    """An independent seed for each purpose of a run."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:7], "big")


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Fix all that decides the order of additions; the process's own settings come back afterwards."""
    old_threads = torch.get_num_threads()
    old_deterministic = torch.are_deterministic_algorithms_enabled()
    old_benchmark = torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    # CUDA has no deterministic form of some backward passes: it warns there instead of failing.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(old_threads)
        torch.use_deterministic_algorithms(old_deterministic)
        torch.backends.cudnn.benchmark = old_benchmark


def mixed_precision(precision: TrainingPrecision, device: torch.device) -> torch.autocast:
    """Convolutions and matrix products in bfloat16, all else in FP32 (Micikevicius et al. 2018)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def supported_precision(device: torch.device) -> TrainingPrecision:
    """bf16 where the processor computes in it, which is faster; emulated it would be slower than FP32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return "bf16" if native else "fp32"


def train(
    network: nn.Module,
    train_images: Images,
    validation_images: Images,
    spec: Preprocessing,
    objective: Objective,
    settings: Training,
    *,
    name: str,
    seed: int,
    state_file: Path,
    fingerprint: str,
    progress: Progress,
    precision: TrainingPrecision = "fp32",
    save_interval_s: float = SAVE_INTERVAL_S,
) -> None:
    """Train `network` in place, on the device it is on; it is in evaluation mode afterwards.

    AdamW (Loshchilov and Hutter 2019) under a one-cycle schedule (Smith and Topin 2018). The state of
    an interrupted training is in `state_file`; a call with the same fingerprint continues from there and
    ends with the weights of an uninterrupted one. A finished training's state gives its weights at once.

    Args:
        network: trained in place.
        train_images: what it learns from.
        validation_images: looked at for early stopping only.
        spec: for mean and standard deviation.
        objective: augmentation and loss.
        settings: epochs, learning rate and so on.
        name: for the progress bar.
        seed: of shuffling and dropout.
        state_file: written at most every `save_interval_s` seconds and at the end.
        fingerprint: of everything that decides the outcome; another one's state is not used.
        progress: running.
        precision: of the convolutions and matrix products; weights, losses and the optimiser stay FP32.
        save_interval_s: 0 saves after every epoch.
    """
    device = next(network.parameters()).device
    network.to(memory_format=torch.channels_last)
    count = len(train_images.targets)
    # A last batch of one image has no variance for batch normalisation.
    steps = count // settings.batch_size + (count % settings.batch_size > 1)
    optimizer = _optimizer(network, settings)
    total_steps = max(settings.epochs * steps, 1)
    # OneCycleLR divides by the warm-up's steps less one, so a warm-up of just one step fails.
    warm_up = _WARM_UP_SHARE if _WARM_UP_SHARE * total_steps != 1 else 2 * _WARM_UP_SHARE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=total_steps, pct_start=warm_up
    )
    stopping = _EarlyStopping(settings.patience)
    first_epoch = 0
    state = _load_state(state_file, fingerprint)
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        stopping.load_state_dict(state["stopping"])
        first_epoch = state["epoch"]

    task = progress.add_task(name, total=settings.epochs * steps, completed=first_epoch * steps, info="")
    saved_at = time.monotonic()
    for epoch in range(first_epoch, settings.epochs):
        if stopping.stopped:
            break
        torch.manual_seed(derive_seed(seed, f"epoch {epoch}"))
        order = torch.randperm(count)
        affines = objective.affines(epoch)
        network.train()
        loss_sum = torch.zeros((), device=device)
        right = torch.zeros((), device=device)
        seen = 0
        for step in range(steps):
            batch = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            images = transform(
                to_float(train_images.pixels[batch.numpy()], device), affines[batch].to(device)
            )
            with mixed_precision(precision, device):
                logits = network(normalise(images, spec)).float()
            loss = objective.loss(logits, batch, epoch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            targets = torch.from_numpy(train_images.targets[batch.numpy()]).to(device)
            loss_sum += loss.detach() * len(batch)
            right += (logits.detach().argmax(1) == targets).sum()
            seen += len(batch)
            mean_loss, accuracy = loss_sum / seen, right / seen
            info = f"epoch {epoch + 1}/{settings.epochs}  loss {mean_loss:.4f}  accuracy {accuracy:.2%}"
            progress.update(task, advance=1, info=info)
        if settings.patience is not None:
            score = evaluate(network, validation_images.pixels, validation_images.targets, spec)
            stopping.update(score, network)
        done = epoch + 1 == settings.epochs or stopping.stopped
        if done or time.monotonic() - saved_at >= save_interval_s:
            _save_state(
                state_file,
                {
                    "fingerprint": fingerprint,
                    "epoch": epoch + 1,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "stopping": stopping.state_dict(),
                },
            )
            saved_at = time.monotonic()
    if stopping.best is not None:
        network.load_state_dict(stopping.best)
    progress.remove_task(task)
    network.to(memory_format=torch.contiguous_format)
    network.eval()


def _optimizer(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,
    )


class _EarlyStopping:
    """Remembers the weights of the lowest validation loss, and when to give up on a lower one."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.loss = float("inf")
        self.waited = 0
        self.best: dict[str, Tensor] | None = None

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def update(self, score: Score, network: nn.Module) -> None:
        if score.loss < self.loss:
            self.loss, self.waited = score.loss, 0
            self.best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "waited": self.waited, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.waited, self.best = state["loss"], state["waited"], state["best"]


def _save_state(path: Path, state: dict[str, Any]) -> None:
    data = io.BytesIO()
    torch.save(state, data)  # to a file, it would hide why writing failed
    with replace_file(path) as new:
        new.write_bytes(data.getbuffer())


def _load_state(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The state of an earlier training of the same fingerprint; a damaged one counts as none."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many types for damaged files; start again after any
        return None
    return state if state.get("fingerprint") == fingerprint else None
