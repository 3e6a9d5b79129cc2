"""A real engine behind a gate: each batch waits until the test lets it run, or makes it fail."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from runtime.engine import Engine, Options, Outputs, Slot
from runtime.loading import load_engine
from runtime.manifest import EngineError, Manifest


class Gate:
    """Open for the warm-up; then each `infer` takes one permit."""

    def __init__(self) -> None:
        self.warmed: list[int] = []  # batches that ran while it was open
        self.batches: list[int] = []
        self.alone: list[bool] = []
        self.fail_next = False
        self._open = True
        self._changed = threading.Condition()
        self._permits = 0
        self._arrived = 0

    def close(self) -> None:
        with self._changed:
            self._open = False

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def allow(self, batches: int = 1) -> None:
        with self._changed:
            self._permits += batches
            self._changed.notify_all()

    def wait_for_arrivals(self, batches: int) -> None:
        """Until that many batches have come to the closed gate."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._arrived >= batches, timeout=20)

    def enter(self, count: int, *, alone: bool) -> None:
        with self._changed:
            if self._open:
                self.warmed.append(count)
                return
            self.batches.append(count)
            self.alone.append(alone)
            self._arrived += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or self._permits > 0, timeout=60)
            if not self._open:
                self._permits -= 1
            if self.fail_next:
                self.fail_next = False
                raise EngineError("the device fell off")


class _GatedSlot:
    def __init__(self, slot: Slot, gate: Gate) -> None:
        self._slot = slot
        self._gate = gate

    @property
    def pixels(self) -> np.ndarray:
        return self._slot.pixels

    def infer(self, count: int, *, alone: bool = False) -> Outputs:
        self._gate.enter(count, alone=alone)
        return self._slot.infer(count, alone=alone)

    def close(self) -> None:
        self._slot.close()


class GatedEngine:
    """`slots` and `on_cpu` are the test's choice: which threads decode, and how many batches run."""

    def __init__(self, engine: Engine, gate: Gate, *, slots: int, on_cpu: bool) -> None:
        self._engine = engine
        self._gate = gate
        self.slots = slots
        self.on_cpu = on_cpu
        self.best_batch = engine.manifest.batch.max
        self.run_sizes = engine.run_sizes

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    def open_slot(self) -> _GatedSlot:
        return _GatedSlot(self._engine.open_slot(), self._gate)

    def close(self) -> None:
        self._engine.close()


def load_gated(gate: Gate, *, slots: int = 1, on_cpu: bool = False):
    return lambda folder: GatedEngine(
        load_engine(Path(folder), Options(slots=slots)), gate, slots=slots, on_cpu=on_cpu
    )
