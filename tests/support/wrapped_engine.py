"""A real engine with a step of the test's before each of its batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from runtime.engine import Engine, Options, Outputs, Slot
from runtime.loading import load_engine
from server.registry import LoadEngine

# Takes the batch's pixels, and whether the slot is alone at work.
Before: TypeAlias = "Callable[[np.ndarray, bool], None]"


class _WrappedSlot:
    def __init__(self, slot: Slot, before: Before) -> None:
        self._slot = slot
        self._before = before

    @property
    def pixels(self) -> np.ndarray:
        return self._slot.pixels

    def infer(self, count: int, *, alone: bool = False) -> Outputs:
        self._before(self._slot.pixels[:count], alone)
        return self._slot.infer(count, alone=alone)

    def close(self) -> None:
        self._slot.close()


class WrappedEngine:
    """`on_cpu` and `alone_s` are the test's choice: which threads decode, and infer."""

    def __init__(self, engine: Engine, before: Before, *, on_cpu: bool, alone_s: float) -> None:
        self._engine = engine
        self._before = before
        self.best_batch = engine.manifest.batch.max
        self.on_cpu = on_cpu
        self.alone_s = alone_s

    def open_slot(self) -> _WrappedSlot:
        return _WrappedSlot(self._engine.open_slot(), self._before)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def load_wrapped(
    before: Before, *, slots: int = 1, on_cpu: bool = False, alone_s: float = math.inf
) -> LoadEngine:
    """How a server loads its engines so that each batch is preceded by `before`, on the batch's thread."""
    return lambda folder: WrappedEngine(
        load_engine(Path(folder), Options(slots=slots)), before, on_cpu=on_cpu, alone_s=alone_s
    )
