"""How fast engines are by themselves: no decoding, no HTTP.

Several engines are timed in turns of a fraction of a second, so that a machine that becomes faster or
slower meanwhile does so for all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Final

import numpy as np
from pydantic import BaseModel, Field

from runtime.engine import Engine
from runtime.timing import TimedSlots

PERCENTILES: Final = (50, 90, 95, 99)

ROUNDS: Final = 10  # of turns


class Timing(BaseModel):
    """One engine at one batch size; milliseconds, of a batch."""

    batch: int
    runs: int
    throughput: float = Field(description="images a second, all slots at work")
    mean_ms: float
    min_ms: float
    max_ms: float
    percentiles_ms: dict[str, float] = Field(description="by `p50`, `p90`, `p95`, `p99`")
    device_ms: dict[str, float] = Field(description="medians of the device's own stages, where it has events")


class _Candidate:
    """One engine under measurement at one batch size."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self._batch = batch
        self._slots = TimedSlots(engine, engine.slots)
        self.close = self._slots.close
        self._latencies: list[float] = []
        self._seconds = 0.0

    def warm_up(self, seconds: float) -> None:
        self._slots.run(self._batch, seconds)
        self._slots.device_ms.clear()

    def run(self, seconds: float) -> None:
        start = time.perf_counter()
        times = self._slots.run(self._batch, seconds)
        self._seconds += time.perf_counter() - start
        self._latencies += itertools.chain.from_iterable(times)

    def timing(self) -> Timing:
        latencies = 1000 * np.array(self._latencies)
        return Timing(
            batch=self._batch,
            runs=len(latencies),
            throughput=len(latencies) * self._batch / self._seconds,
            mean_ms=float(latencies.mean()),
            min_ms=float(latencies.min()),
            max_ms=float(latencies.max()),
            percentiles_ms={f"p{share}": float(np.percentile(latencies, share)) for share in PERCENTILES},
            device_ms={stage: float(np.median(taken)) for stage, taken in self._slots.device_ms.items()},
        )


def time_engines(
    engines: Sequence[Engine], batch: int, *, seconds: float, warm_up: float, progress: Callable[[], None]
) -> list[Timing]:
    """Time `engines` in turns on random pixels.

    Args:
        engines: to compare; `batch` must be within the sizes of each.
        batch: images in one inference.
        seconds: for each engine.
        warm_up: seconds for each engine before that.
        progress: called `ROUNDS` times.

    Returns:
        One timing an engine, in their order.

    Raises:
        EngineError: an engine failed.
        ValueError: `batch` is outside an engine's sizes.
    """
    with ExitStack() as stack:
        candidates = [stack.enter_context(closing(_Candidate(engine, batch))) for engine in engines]
        for candidate in candidates:
            candidate.warm_up(warm_up)
        for _ in range(ROUNDS):
            for candidate in candidates:
                candidate.run(seconds / ROUNDS)
            progress()
        return [candidate.timing() for candidate in candidates]
