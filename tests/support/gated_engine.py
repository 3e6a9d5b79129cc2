"""A gate before a real engine: each batch waits until the test lets it run, or makes it fail."""

from __future__ import annotations

import threading

import numpy as np
from wrapped_engine import load_wrapped

from runtime.manifest import EngineError
from server.registry import LoadEngine


class Gate:
    """Open at first; once closed, each batch takes one permit.

    Attributes:
        batches: sizes of the batches that came while it was closed.
        alone: for each of them, whether its slot was alone at work.
        fail_next: fail the next of them.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.alone: list[bool] = []
        self.fail_next = False
        self._open = True
        self._changed = threading.Condition()
        self._permits = 0

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
            assert self._changed.wait_for(lambda: len(self.batches) >= batches, timeout=20)

    def enter(self, pixels: np.ndarray, alone: bool) -> None:
        with self._changed:
            if self._open:
                return
            self.batches.append(len(pixels))
            self.alone.append(alone)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or self._permits > 0, timeout=60)
            if not self._open:
                self._permits -= 1
            if self.fail_next:
                self.fail_next = False
                raise EngineError("the device fell off")


def load_gated(gate: Gate, *, slots: int = 1, on_cpu: bool = False) -> LoadEngine:
    """How a server loads its engines with `gate` before them."""
    return load_wrapped(gate.enter, slots=slots, on_cpu=on_cpu)
