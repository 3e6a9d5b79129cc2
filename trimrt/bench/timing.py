"""How fast engines are by themselves: no decoding, no HTTP.

Several engines are timed in turns of a fraction of a second, so that a machine that becomes faster or
slower meanwhile does so for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

import numpy as np
from pydantic import BaseModel, Field

from runtime.engine import Engine, Slot
from runtime.threads import EngineThread

PERCENTILES: Final = (50, 90, 95, 99)

_ROUNDS: Final = 10


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


class _Lane:
    """A slot on a thread of its own, as slots require."""

    def __init__(self, engine: Engine) -> None:
        self._thread = EngineThread()
        self.latencies: list[float] = []
        self.stages: dict[str, list[float]] = {}
        self._slot: Slot = self._thread.submit(engine.open_slot).result()
        pixels = self._slot.pixels
        pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)

    def start(self, batch: int, end: float) -> Callable[[], None]:
        """Run batches until `end`; the function returned waits for them."""
        return self._thread.submit(partial(self._run, batch, end)).result

    def _run(self, batch: int, end: float) -> None:
        while True:
            start = time.perf_counter()
            outputs = self._slot.infer(batch)
            finished = time.perf_counter()
            self.latencies.append(finished - start)
            for stage, milliseconds in outputs.timings_ms.items():
                self.stages.setdefault(stage, []).append(milliseconds)
            if finished >= end:
                return

    def close(self) -> None:
        """Close the slot where it was opened."""
        self._thread.submit(self._slot.close).result()
        self._thread.close()


class _Candidate:
    """One engine under measurement at one batch size."""

    def __init__(self, engine: Engine, batch: int, stack: ExitStack) -> None:
        self._batch = batch
        self._lanes: list[_Lane] = []
        for _ in range(engine.slots):
            lane = _Lane(engine)
            stack.callback(lane.close)
            self._lanes.append(lane)
        self._seconds = 0.0

    def warm_up(self, seconds: float) -> None:
        self.run(seconds)
        self._seconds = 0.0
        for lane in self._lanes:
            lane.latencies.clear()
            lane.stages.clear()

    def run(self, seconds: float) -> None:
        start = time.perf_counter()
        for wait in [lane.start(self._batch, start + seconds) for lane in self._lanes]:
            wait()
        self._seconds += time.perf_counter() - start

    def timing(self) -> Timing:
        latencies = 1000 * np.concatenate([lane.latencies for lane in self._lanes])
        stages: dict[str, list[float]] = {}
        for lane in self._lanes:
            for stage, values in lane.stages.items():
                stages.setdefault(stage, []).extend(values)
        return Timing(
            batch=self._batch,
            runs=len(latencies),
            throughput=len(latencies) * self._batch / self._seconds,
            mean_ms=float(latencies.mean()),
            min_ms=float(latencies.min()),
            max_ms=float(latencies.max()),
            percentiles_ms={f"p{share}": float(np.percentile(latencies, share)) for share in PERCENTILES},
            device_ms={stage: float(np.median(values)) for stage, values in stages.items()},
        )


@contextmanager
def _candidates(engines: Sequence[Engine], batch: int) -> Iterator[list[_Candidate]]:
    with ExitStack() as stack:
        yield [_Candidate(engine, batch, stack) for engine in engines]


def time_engines(
    engines: Sequence[Engine], batch: int, *, seconds: float, warm_up: float, progress: Callable[[], None]
) -> list[Timing]:
    """Time `engines` in turns on random pixels.

    Args:
        engines: to compare; `batch` must be within the sizes of each.
        batch: images in one inference.
        seconds: for each engine.
        warm_up: seconds for each engine before that.
        progress: called `rounds()` times.

    Returns:
        One timing an engine, in their order.

    Raises:
        EngineError: an engine failed.
        ValueError: `batch` is outside an engine's sizes.
    """
    with _candidates(engines, batch) as candidates:
        for candidate in candidates:
            candidate.warm_up(warm_up)
        for _ in range(_ROUNDS):
            for candidate in candidates:
                candidate.run(seconds / _ROUNDS)
            progress()
        return [candidate.timing() for candidate in candidates]


def rounds() -> int:
    """How often `time_engines` reports progress."""
    return _ROUNDS
