"""One way to run what the report compares: PyTorch networks and compiled engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from builder.compile.verification import engine_logits
from models.card import Card
from models.preprocessing import Pixels, Preprocessing
from runtime.loading import load_engine
from runtime.manifest import Manifest

if TYPE_CHECKING:
    from torch import nn


class Subject(Protocol):
    """A network that runs here."""

    batch: int
    spec: Preprocessing

    def labels(self, pixels: Pixels) -> NDArray[np.int64]:
        """Class indices of uint8 NHWC pixels, shape (N,)."""

    def stopwatch(self, stack: ExitStack) -> Callable[[], object]:
        """What runs one batch of `batch` images, until `stack` closes."""


class NetworkSubject:
    """The network of a checkpoint, run by PyTorch in FP32 on the CPU.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ImportError: PyTorch is not installed.
    """

    batch = 1

    def __init__(self, folder: Path) -> None:
        from models.checkpoint import load_checkpoint

        self.network, self.card = load_checkpoint(folder)
        self.spec = self.card.preprocessing

    def labels(self, pixels: Pixels) -> NDArray[np.int64]:
        """Class indices of uint8 NHWC pixels, shape (N,)."""
        from models.evaluation import predict_logits

        labels: NDArray[np.int64] = predict_logits(self.network, pixels, self.spec).numpy().argmax(axis=1)
        return labels

    def stopwatch(self, stack: ExitStack) -> Callable[[], object]:
        """What runs one image, already normalised."""
        return network_stopwatch(self.network, self.spec)


def network_stopwatch(network: nn.Module, spec: Preprocessing) -> Callable[[], object]:
    """What runs a PyTorch network on one image, already normalised."""
    import torch

    image = torch.zeros(1, 3, spec.height, spec.width)

    def run() -> None:
        with torch.inference_mode():
            network(image)

    return run


class EngineSubject:
    """An engine package, run by its backend.

    Raises:
        EngineError: the engine cannot run here.
    """

    def __init__(self, folder: Path) -> None:
        self.engine = load_engine(folder)
        self.manifest: Manifest = self.engine.manifest
        self.batch = self.manifest.batch.min
        self.spec = self.manifest.preprocessing
        with ExitStack() as stack:
            self.stopwatch(stack)()  # an engine that loads may still fail to run

    def labels(self, pixels: Pixels) -> NDArray[np.int64]:
        """Class indices of uint8 NHWC pixels, shape (N,)."""
        labels: NDArray[np.int64] = engine_logits(self.engine, pixels).argmax(axis=1)
        return labels

    def stopwatch(self, stack: ExitStack) -> Callable[[], object]:
        """What runs one batch of random pixels."""
        slot = stack.enter_context(closing(self.engine.open_slot()))
        slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, dtype=np.uint8)
        return lambda: slot.infer(self.batch, alone=True)


def open_subject(folder: Path, described_by: Card | Manifest) -> Subject:
    """The checkpoint or engine package in `folder`, ready to run."""
    return NetworkSubject(folder) if isinstance(described_by, Card) else EngineSubject(folder)
