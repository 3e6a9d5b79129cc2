"""Engines by themselves, at work and timed: no server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from runtime.engine import Engine, Slot
from runtime.threads import EngineThread


class TimedSlots:
    """Open slots of one engine, each on a thread of its own, as slots require.

    Args:
        engine: its slots are filled with noise.
        count: how many slots work at once.
        fill: makes a slot's batch anew, in its thread, before every run; None: the noise stays.

    Raises:
        EngineError: a slot does not open.
    """

    def __init__(self, engine: Engine, count: int, fill: Callable[[Slot], None] | None = None) -> None:
        self._fill = fill
        self._threads = [EngineThread() for _ in range(count)]
        self._slots = [thread.submit(partial(_open, engine)).result() for thread in self._threads]
        self.device_ms: dict[str, list[float]] = {}  # of each run, by stage, where the device has events

    def run(self, batch: int, seconds: float, *, alone: bool = False) -> list[list[float]]:
        """Run batches for so many seconds, and until those begun are done.

        Args:
            batch: images of each.
            seconds: may be 0: one batch of each slot.
            alone: on the first slot only, which is told so.

        Returns:
            Seconds that each batch took, by slot.

        Raises:
            EngineError: the engine failed.
        """
        runs = [
            thread.submit(partial(self._work, slot, batch, seconds, alone))
            for thread, slot in list(zip(self._threads, self._slots, strict=True))[: 1 if alone else None]
        ]
        return [run.result() for run in runs]

    def close(self) -> None:
        """Close the slots where they were opened."""
        for thread, slot in zip(self._threads, self._slots, strict=True):
            thread.submit(slot.close).result()
            thread.close()

    def _work(self, slot: Slot, batch: int, seconds: float, alone: bool) -> list[float]:
        times: list[float] = []
        now = time.perf_counter()
        end = now + seconds
        while not times or now < end:
            if self._fill is not None:
                self._fill(slot)
            outputs = slot.infer(batch, alone=alone)
            before, now = now, time.perf_counter()
            times.append(now - before)
            for stage, milliseconds in outputs.timings_ms.items():
                self.device_ms.setdefault(stage, []).append(milliseconds)
        return times


def rate(batch: int, times: Sequence[Sequence[float]]) -> float:
    """Images a second; a slot that is done early waits for nobody: each counts until its own last batch."""
    return sum(batch * len(own) / sum(own) for own in times)


def _open(engine: Engine) -> Slot:
    slot = engine.open_slot()
    slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, dtype=np.uint8)
    return slot
