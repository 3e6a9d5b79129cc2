"""Training a network on augmented images: resumable, and the same to the bit with the same seed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from models.augmentation import random_affines, transform
from models.evaluation import Score, evaluate, normalise, to_float
from models.preprocessing import Pixels, Preprocessing
from models.recipe import Augmentation, Training, TrainingPrecision
from models.state import SAVE_INTERVAL_S, StateSaver, load_state, save_state

# Limits that oneDNN, which computes the convolutions, can be given.
_ISAS_WITHOUT_BF16: Final = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
_WARM_UP_SHARE: Final = 0.2
_TIMING_S: Final = 1.0
_MOST_TIMED_STEPS: Final = 5


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
        features, limit = torch.cpu.get_capabilities(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")
        native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
        native = native and limit.upper() not in _ISAS_WITHOUT_BF16
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
        state_file: written at least every `save_interval_s` seconds, on Ctrl-C and at the end.
        fingerprint: of everything that decides the outcome; another one's state is not used.
        progress: running.
        precision: of the convolutions and matrix products; weights, losses and the optimiser stay FP32.
        save_interval_s: 0 saves after every step.

    Raises:
        KeyboardInterrupt: Ctrl-C; the state is saved.
    """
    device = next(network.parameters()).device
    network.to(memory_format=torch.channels_last)
    count = len(train_images.targets)
    steps = steps_of_epoch(count, settings)
    course = _Course(network, settings, steps)
    state = load_state(state_file, fingerprint)
    if state is not None:
        course.load_state_dict(state)

    def save() -> None:
        save_state(state_file, fingerprint, course.state_dict())

    task = progress.add_task(
        name, total=settings.epochs * steps, completed=course.epoch * steps + course.step, info=""
    )
    with StateSaver(save, save_interval_s) as saver:
        while course.epoch < settings.epochs and not course.stopping.stopped:
            epoch = course.epoch
            torch.manual_seed(derive_seed(seed, f"epoch {epoch}"))
            order = torch.randperm(count)
            affines = objective.affines(epoch)
            course.restore_random()
            network.train()
            loss_sum = torch.zeros((), device=device)
            right = torch.zeros((), device=device)
            seen = 0
            for step in range(course.step, steps):
                batch = order[step * settings.batch_size : (step + 1) * settings.batch_size]
                loss, logits = _learn(
                    course, train_images.pixels, batch, affines, spec, objective, epoch, precision
                )
                targets = torch.from_numpy(train_images.targets[batch.numpy()]).to(device)
                loss_sum += loss * len(batch)
                right += (logits.argmax(1) == targets).sum()
                seen += len(batch)
                mean_loss, accuracy = loss_sum / seen, right / seen
                info = f"epoch {epoch + 1}/{settings.epochs}  loss {mean_loss:.4f}  accuracy {accuracy:.2%}"
                progress.update(task, advance=1, info=info)
                course.step = step + 1
                saver.step_done()
            if settings.patience is not None:
                score = evaluate(network, validation_images.pixels, validation_images.targets, spec)
                course.stopping.update(score, network)
            course.epoch, course.step = epoch + 1, 0
            if course.epoch == settings.epochs or course.stopping.stopped:
                saver.save()
    if course.stopping.best is not None:
        network.load_state_dict(course.stopping.best)
    progress.remove_task(task)
    network.zero_grad()  # gradients take as much memory as the weights
    network.to(memory_format=torch.contiguous_format)
    network.eval()


def steps_of_epoch(images: int, settings: Training) -> int:
    """How many batches one pass over that many images takes."""
    # A last batch of one image has no variance for batch normalisation.
    return images // settings.batch_size + (images % settings.batch_size > 1)


def time_step(
    network: nn.Module,
    images: Images,
    spec: Preprocessing,
    limits: Augmentation,
    settings: Training,
    precision: TrainingPrecision,
) -> float:
    """Seconds that one step of training takes on average, of full batches; `network` is used up."""
    network.to(memory_format=torch.channels_last)
    course = _Course(network, settings.model_copy(update={"epochs": 1}), _MOST_TIMED_STEPS)
    batch = torch.arange(min(settings.batch_size, len(images.targets)))
    objective = TrueLabels(torch.from_numpy(images.targets), limits, 0)
    affines = objective.affines(0)
    network.train()
    times: list[float] = []
    # The first step also sets everything up.
    while len(times) < 2 or (sum(times) < _TIMING_S and len(times) < _MOST_TIMED_STEPS):
        began = time.perf_counter()
        loss, _ = _learn(course, images.pixels, batch, affines, spec, objective, 0, precision)
        float(loss)  # waits for a GPU
        times.append(time.perf_counter() - began)
    return mean(times[1:])  # whatever else the machine does now will slow the training too


def _learn(
    course: _Course,
    pixels: Pixels,
    batch: Tensor,
    affines: Tensor,
    spec: Preprocessing,
    objective: Objective,
    epoch: int,
    precision: TrainingPrecision,
) -> tuple[Tensor, Tensor]:
    """One step on the images numbered `batch`; its mean loss and logits."""
    device = next(course.network.parameters()).device
    images = transform(to_float(pixels[batch.numpy()], device), affines[batch].to(device))
    with mixed_precision(precision, device):
        logits = course.network(normalise(images, spec)).float()
    loss = objective.loss(logits, batch, epoch)
    course.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    course.optimizer.step()
    course.schedule.step()
    return loss.detach(), logits.detach()


class _Course:
    """A training on its way: the network, the optimiser, and how far they have come."""

    def __init__(self, network: nn.Module, settings: Training, steps: int) -> None:
        """Stand before the first of `steps` steps of the first epoch."""
        self.network = network
        self.optimizer = _optimizer(network, settings)
        total_steps = max(settings.epochs * steps, 1)
        # OneCycleLR divides by the warm-up's steps less one, so a warm-up of just one step fails.
        warm_up = _WARM_UP_SHARE if _WARM_UP_SHARE * total_steps != 1 else 2 * _WARM_UP_SHARE
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.learning_rate, total_steps=total_steps, pct_start=warm_up
        )
        self.stopping = _EarlyStopping(settings.patience)
        self.epoch = 0
        self.step = 0
        self._random: list[Tensor] | None = None

    def restore_random(self) -> None:
        """Go on with dropout where the state that was loaded left off."""
        if self._random is not None:
            cpu, *gpu = self._random
            torch.set_rng_state(cpu)
            if gpu:
                torch.cuda.set_rng_state(gpu[0])
            self._random = None

    def state_dict(self) -> dict[str, Any]:
        random = [torch.get_rng_state()]
        if next(self.network.parameters()).is_cuda:
            random.append(torch.cuda.get_rng_state())
        return {
            "epoch": self.epoch,
            "step": self.step,
            "random": random,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "stopping": self.stopping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.stopping.load_state_dict(state["stopping"])
        self.epoch, self.step = state["epoch"], state["step"]
        if self.step > 0:  # else the epoch begins with a seed of its own
            self._random = state["random"]


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
