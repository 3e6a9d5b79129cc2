"""Latency distributions in bounded memory: since start, and over the last minute."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import log2
from typing import Final

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9)

# Sixteen buckets an octave: a percentile is at most 2.2 % off. The bounds pass through 0.1 ms, so that
# every eighth of them can be a Prometheus bucket.
_PER_OCTAVE: Final = 16
_LOWEST_S: Final = 1e-4 / 2**7
_BUCKETS: Final = 27 * _PER_OCTAVE  # up to 105 s; beyond it everything is in the last one

_SLICES: Final = 12
_SLICE_S: Final = 5.0


def bucket_bound(index: int) -> float:
    """Upper bound of bucket `index`, seconds."""
    return float(_LOWEST_S * 2.0 ** ((index + 1) / _PER_OCTAVE))


class Histogram:
    """Log-bucketed durations, after Prometheus's native histograms and HdrHistogram."""

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * _BUCKETS))
        self.count = 0
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[_bucket(seconds)] += 1
        self.count += 1
        self.sum += seconds

    def merge(self, other: Histogram) -> None:
        """Count everything `other` counted."""
        for index, count in enumerate(other.counts):
            if count:
                self.counts[index] += count
        self.count += other.count
        self.sum += other.sum

    def percentile(self, percent: float) -> float:
        """The duration that `percent` of the counted ones do not exceed, seconds; NaN when empty."""
        rank = percent / 100 * self.count
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return bucket_bound(index) / 2 ** (0.5 / _PER_OCTAVE)
        return float("nan")

    def cumulative(self, octaves: int = 16) -> Iterator[tuple[float, int]]:
        """Prometheus buckets, two an octave from 0.1 ms: upper bound in seconds, count up to it."""
        first = 7 * _PER_OCTAVE  # buckets below 0.1 ms
        seen, done = 0, 0
        for upto in range(first, first + octaves * _PER_OCTAVE + 1, _PER_OCTAVE // 2):
            seen += sum(self.counts[done:upto])
            done = upto
            yield bucket_bound(upto - 1), seen


def _bucket(seconds: float) -> int:
    if seconds <= _LOWEST_S:
        return 0
    return min(int(log2(seconds / _LOWEST_S) * _PER_OCTAVE), _BUCKETS - 1)


class Distribution:
    """A histogram since start, and one of the last minute made of five-second slices."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.total = Histogram()
        self._slices: dict[int, Histogram] = {}

    def add(self, seconds: float) -> None:
        """Count one duration, now."""
        self.total.add(seconds)
        now = int(self._clock() / _SLICE_S)
        current = self._slices.get(now)
        if current is None:
            current = self._slices[now] = Histogram()
            for old in [number for number in self._slices if number <= now - _SLICES]:
                del self._slices[old]
        current.add(seconds)

    def last_minute(self) -> Histogram:
        """What was counted in the last 55 to 60 seconds."""
        now = int(self._clock() / _SLICE_S)
        merged = Histogram()
        for number, histogram in self._slices.items():
            if number > now - _SLICES:
                merged.merge(histogram)
        return merged


@dataclass
class EngineStats:
    """What one engine did. Touched by the event loop's thread only, so it needs no lock."""

    stages: dict[str, Distribution] = field(
        default_factory=lambda: {stage: Distribution() for stage in ("decode", "queue", "inference", "total")}
    )
    batches: dict[int, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def batch(self, size: int) -> None:
        """Count a batch of `size` images."""
        self.batches[size] = self.batches.get(size, 0) + 1

    def image(self, *, decode: float, queue: float, inference: float, total: float) -> None:
        """Count one answered image; durations in seconds."""
        stages = self.stages
        stages["decode"].add(decode)
        stages["queue"].add(queue)
        stages["inference"].add(inference)
        stages["total"].add(total)

    def drop(self, reason: str, images: int) -> None:
        """Count images that were dropped before compute."""
        self.dropped[reason] = self.dropped.get(reason, 0) + images
