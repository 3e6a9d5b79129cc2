"""How fast an engine is, on the machine it was built on, and how models compare in speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Engine
from runtime.timing import TimedSlots, rate

_MIN_ROUNDS: Final = 3
MEASURE_SECONDS: Final = 0.5  # for each of the two figures
_WARM_UP_SHARE: Final = 0.1


@dataclass(frozen=True)
class Speed:
    """Of the engine alone, without decoding or HTTP.

    Attributes:
        latency_ms: median time of the smallest batch (one image, unless the engine's is fixed).
        throughput: images per second, all slots at once with the largest batch.
        least_ms: least time of the smallest batch, which latency tables have.
    """

    latency_ms: float
    throughput: float
    least_ms: float


def measure(engine: Engine) -> Speed:
    """Time `engine` on random pixels; all its slots are opened.

    Raises:
        EngineError: the engine failed.
    """
    return measure_in_turns([engine], rounds=1)[0]


def measure_in_turns(engines: Sequence[Engine], rounds: int = 7) -> list[Speed]:
    """Time engines on random pixels several times, in turns, and take the best round of each.

    What else the machine does only makes rounds slower, and not those of one engine alone: the best say most
    about the engines. All their slots are opened.

    Args:
        engines: what to time.
        rounds: how many share the seconds of a measurement.

    Returns:
        Of each engine, the least latency and the largest throughput.

    Raises:
        EngineError: an engine failed.
    """
    with ExitStack() as stack:
        opened = [
            (engine, stack.enter_context(closing(TimedSlots(engine, engine.slots)))) for engine in engines
        ]
        speeds = [[_measure(engine, slots, rounds) for engine, slots in opened] for _ in range(rounds)]
    return [
        Speed(
            latency_ms=min(speed.latency_ms for speed in found),
            throughput=max(speed.throughput for speed in found),
            least_ms=min(speed.least_ms for speed in found),
        )
        for found in zip(*speeds, strict=True)
    ]


def _measure(engine: Engine, slots: TimedSlots, rounds: int) -> Speed:
    batch, seconds = engine.manifest.batch, MEASURE_SECONDS / rounds
    slots.run(batch.min, _WARM_UP_SHARE * seconds, alone=True)
    latencies = 1000 * np.array(slots.run(batch.min, seconds, alone=True))
    slots.run(batch.max, _WARM_UP_SHARE * seconds)
    throughput = rate(batch.max, slots.run(batch.max, seconds))
    return Speed(
        latency_ms=float(np.median(latencies)), throughput=throughput, least_ms=float(latencies.min())
    )


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
