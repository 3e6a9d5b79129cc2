"""How fast an engine is, on the machine it was built on, and how models compare in speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Engine
from runtime.threads import start_in_engine_thread

WARM_UP_RUNS: Final = 5
_MAX_RUNS: Final = 1000
_MIN_ROUNDS: Final = 3
_MEASURE_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Speed:
    """Of the engine alone, without decoding or HTTP.

    Attributes:
        latency_ms: median time of the smallest batch (one image, unless the engine's is fixed).
        throughput: images per second, all slots at once with the largest batch.
    """

    latency_ms: float
    throughput: float


def measure(engine: Engine, seconds: float = _MEASURE_SECONDS) -> Speed:
    """Time `engine` on random pixels, `seconds` for each of the two figures.

    Raises:
        EngineError: the engine failed.
    """
    batch = engine.manifest.batch
    latencies = _run(engine, batch.min, seconds, alone=True)
    runs = [start_in_engine_thread(partial(_run, engine, batch.max, seconds)) for _ in range(engine.slots)]
    throughput = sum(batch.max * len(times) / sum(times) for times in (run.result() for run in runs))
    return Speed(latency_ms=float(np.median(latencies)) * 1000, throughput=throughput)


def measure_in_turns(engines: Sequence[Engine], rounds: int = 3) -> list[Speed]:
    """Time each engine several times, in turns, so that a brief disturbance does not disqualify an engine.

    Returns:
        The medians of each engine.

    Raises:
        EngineError: an engine failed.
    """
    speeds = [[measure(engine, _MEASURE_SECONDS / rounds) for engine in engines] for _ in range(rounds)]
    return [
        Speed(
            latency_ms=median(speed.latency_ms for speed in found),
            throughput=median(speed.throughput for speed in found),
        )
        for found in zip(*speeds, strict=True)
    ]


def time_in_turns(
    runs: Sequence[Callable[[], object]],
    *,
    seconds: float = 0,
    rounds: int = _MIN_ROUNDS,
    progress: Callable[[float], None] = lambda _share: None,
) -> list[NDArray[np.float64]]:
    """Times of each of `runs`, in turns, so that a brief disturbance slows all of them alike.

    Args:
        runs: what to time.
        seconds: for all of them together, at least.
        rounds: at least so many are done.
        progress: takes the share that is done, after each round.

    Returns:
        Milliseconds, one array of shape (rounds,) for each of `runs`.
    """
    times: list[list[float]] = [[] for _ in runs]
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() < started + seconds:
        for run, taken in zip(runs, times, strict=True):
            run()  # warm the caches again after the other models
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        done += 1
        progress(min(1.0, done / rounds, (time.perf_counter() - started) / max(seconds, 1e-9)))
    return [1000 * np.array(taken) for taken in times]


def _run(engine: Engine, count: int, seconds: float, *, alone: bool = False) -> list[float]:
    """Seconds of each run of a batch of `count`, on a slot of this thread's own."""
    with closing(engine.open_slot()) as slot:
        slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, dtype=np.uint8)
        for _ in range(WARM_UP_RUNS):
            slot.infer(count, alone=alone)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or (len(times) < _MAX_RUNS and time.perf_counter() < end):
            start = time.perf_counter()
            slot.infer(count, alone=alone)
            times.append(time.perf_counter() - start)
        return times
