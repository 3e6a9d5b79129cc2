"""How fast an engine is, on the machine it was built on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import numpy as np

from server.engines.base import Engine

WARM_UP_RUNS: Final = 5
_MAX_RUNS: Final = 1000


@dataclass(frozen=True)
class Speed:
    """Both are of the engine alone: no decoding, no HTTP.

    Attributes:
        latency_ms: median time of the smallest batch (one image, unless the engine's is fixed).
        throughput: images per second, all slots at once with the largest batch.
    """

    latency_ms: float
    throughput: float


def measure(engine: Engine, seconds: float = 0.5) -> Speed:
    """Time `engine` on random pixels, `seconds` for each of the two figures.

    Raises:
        EngineError: the engine failed.
    """
    batch = engine.manifest.batch
    latencies = _run(engine, batch.min, seconds)
    with ThreadPoolExecutor(engine.slots) as pool:
        runs = [pool.submit(_run, engine, batch.max, seconds) for _ in range(engine.slots)]
        throughput = sum(batch.max * len(times) / sum(times) for times in (run.result() for run in runs))
    return Speed(latency_ms=float(np.median(latencies)) * 1000, throughput=throughput)


def _run(engine: Engine, count: int, seconds: float) -> list[float]:
    """Seconds of each run of a batch of `count`, on a slot of this thread's own."""
    with closing(engine.open_slot()) as slot:
        slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, dtype=np.uint8)
        for _ in range(WARM_UP_RUNS):
            slot.infer(count)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or (len(times) < _MAX_RUNS and time.perf_counter() < end):
            start = time.perf_counter()
            slot.infer(count)
            times.append(time.perf_counter() - start)
        return times
