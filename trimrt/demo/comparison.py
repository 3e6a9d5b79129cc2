"""A checkpoint, those it came from, and its engines in one table, all timed in the same run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich import box
from rich.table import Column, Table
from torch import nn

from builder.compile.measurement import time_in_turns
from models.card import Ancestor, Card, Metrics
from models.checkpoint import load_checkpoint
from models.datasets import ImageSet
from models.networks import build_network
from trimrt.report.subjects import EngineSubject, network_stopwatch

_TIMING_SECONDS: Final = 2.0
_BYTES_PER_WEIGHT: Final = 4


@dataclass(frozen=True)
class _Row:
    name: str
    parameters: int
    macs: int
    size: int
    accuracy: float
    run: Callable[[], object]


def compare(checkpoint: Path, packages: list[Path], test: ImageSet) -> Table:
    """What compression and each precision gain and cost.

    Args:
        checkpoint: the student that the packages were built from.
        packages: engine packages of it that this machine can run.
        test: images for the engines' accuracy; the networks' is the one in the card.

    Raises:
        CheckpointError, EngineError: a folder that cannot be used.
    """
    network, card = load_checkpoint(checkpoint)
    with ExitStack() as stack:
        rows = [_ancestor_row(ancestor, card) for ancestor in card.lineage]
        rows.append(_network_row(card.role, card.architecture, card.metrics, network, card))
        networks = len(rows)
        rows += [_engine_row(package, card, test, stack) for package in packages]
        return _table(rows, networks)


def _ancestor_row(ancestor: Ancestor, card: Card) -> _Row:
    # The ancestor's weights need not be here: how fast a network is does not depend on them.
    network = build_network(ancestor.architecture, len(card.labels), card.stem).eval()
    return _network_row(ancestor.role, ancestor.architecture, ancestor.metrics, network, card)


def _network_row(role: str, architecture: str, metrics: Metrics, network: nn.Module, card: Card) -> _Row:
    return _Row(
        name=f"{role} {architecture}",
        parameters=metrics.parameters,
        macs=metrics.macs,
        size=_BYTES_PER_WEIGHT * metrics.parameters,
        accuracy=metrics.accuracy,
        run=network_stopwatch(network, card.preprocessing),
    )


def _engine_row(package: Path, card: Card, test: ImageSet, stack: ExitStack) -> _Row:
    subject = EngineSubject(package)
    stack.callback(subject.engine.close)
    labels = subject.labels(test.load_pixels(subject.spec))
    return _Row(
        name=f"{subject.manifest.precision} engine",
        parameters=card.metrics.parameters,
        macs=card.metrics.macs,
        size=(package / "model.onnx").stat().st_size,
        accuracy=float(np.mean(labels == test.targets)),
        run=subject.stopwatch(stack),
    )


def _table(rows: list[_Row], networks: int) -> Table:
    taken = time_in_turns([row.run for row in rows], seconds=_TIMING_SECONDS)
    times = [float(milliseconds.min()) for milliseconds in taken]
    table = Table(
        Column("model", no_wrap=True),
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        caption="Size: the weights, or the engine's graph with them. Latency: one image alone,\n"
        "the best of many, on all of this machine's cores; PyTorch runs the networks.",
        caption_justify="left",
    )
    for title in ("parameters", "MACs", "size", "accuracy", "latency", "speed"):
        table.add_column(title, justify="right", no_wrap=True)
    for index, (row, milliseconds) in enumerate(zip(rows, times, strict=True), 1):
        table.add_row(
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.macs / 1e6:.1f} M",
            f"{row.size / 1e6:.2f} MB",
            f"{row.accuracy:.2%}",
            f"{milliseconds:.2f} ms",
            f"{times[0] / milliseconds:.1f}x",
            end_section=index == networks,
        )
    return table
