"""A real engine that takes longer: a stand-in for a slow device, where a test must know the capacity."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from runtime.engine import Engine, Outputs, Slot
from runtime.loading import load_engine
from runtime.manifest import Manifest
from server.registry import LoadEngine


class _SlowSlot:
    def __init__(self, slot: Slot, seconds: float) -> None:
        self._slot = slot
        self._seconds = seconds

    @property
    def pixels(self) -> np.ndarray:
        return self._slot.pixels

    def infer(self, count: int, *, alone: bool = False) -> Outputs:
        time.sleep(self._seconds)
        return self._slot.infer(count, alone=alone)

    def close(self) -> None:
        self._slot.close()


class SlowEngine:
    def __init__(self, engine: Engine, seconds: float) -> None:
        self._engine = engine
        self._seconds = seconds
        self.slots = 1
        self.best_batch = engine.manifest.batch.max
        self.run_sizes = engine.run_sizes
        self.on_cpu = False  # decoding does not wait for the slot

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    def open_slot(self) -> _SlowSlot:
        return _SlowSlot(self._engine.open_slot(), self._seconds)

    def close(self) -> None:
        self._engine.close()


def load_slow(seconds_per_batch: float) -> LoadEngine:
    return lambda folder: SlowEngine(load_engine(Path(folder)), seconds_per_batch)
