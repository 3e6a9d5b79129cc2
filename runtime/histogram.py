"""Durations, counted in bounded memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Sixteen buckets an octave: a percentile is at most 2.2 % off. The bounds pass through 0.1 ms, so that
# every eighth of them can be a Prometheus bucket.
_PER_OCTAVE: Final = 16
_LOWEST_S: Final = 1e-4 / 2**7
_BUCKETS: Final = 27 * _PER_OCTAVE  # up to 105 s; beyond it everything is in the last one
_FIRST_BOUND: Final = 7 * _PER_OCTAVE - 1  # the bucket that ends at 0.1 ms

WINDOW_S: Final = 60  # what a distribution remembers second by second


def bucket_bound(index: int) -> float:
    """Upper bound of bucket `index`, seconds."""
    return float(_LOWEST_S * 2.0 ** ((index + 1) / _PER_OCTAVE))


class Histogram:
    """Log-bucketed durations, after HdrHistogram; only the buckets in use are kept."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.count = 0
        self.sum = 0.0

    def add(self, seconds: Sequence[float]) -> None:
        """Count durations."""
        buckets, counts = np.unique(buckets_of(seconds), return_counts=True)
        self.counts.update(dict(zip(buckets.tolist(), counts.tolist(), strict=True)))
        self.count += len(seconds)
        self.sum += sum(seconds)

    def merge(self, other: Histogram) -> None:
        """Count everything `other` counted."""
        self.counts.update(other.counts)
        self.count += other.count
        self.sum += other.sum

    def percentile(self, percent: float) -> float | None:
        """The duration that `percent` of the counted ones do not exceed, seconds; None when empty."""
        rank = percent / 100 * self.count
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return bucket_bound(bucket) / 2 ** (0.5 / _PER_OCTAVE)
        return None

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Prometheus buckets, two an octave from 0.1 ms to 6.6 s: upper bound in seconds, count up to it."""
        for bound in range(_FIRST_BOUND, _FIRST_BOUND + 16 * _PER_OCTAVE + 1, _PER_OCTAVE // 2):
            yield bucket_bound(bound), sum(n for bucket, n in self.counts.items() if bucket <= bound)


class Distribution:
    """A histogram since start, and one for each second of the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.total = Histogram()
        self._seconds: dict[int, Histogram] = {}

    def add(self, seconds: Sequence[float], second: int) -> None:
        """Count durations that ended in that second of the clock."""
        histogram = Histogram()
        histogram.add(seconds)
        self.total.merge(histogram)
        self._seconds.setdefault(second, Histogram()).merge(histogram)
        for old in [known for known in self._seconds if known <= second - WINDOW_S]:
            del self._seconds[old]

    def merge(self, other: Distribution) -> None:
        """Count everything `other` counted."""
        self.total.merge(other.total)
        for second, histogram in other._seconds.items():
            self._seconds.setdefault(second, Histogram()).merge(histogram)

    def recent(self, seconds: int = WINDOW_S) -> Histogram:
        """What was counted in the last `seconds`, at most `WINDOW_S` of them."""
        now = int(self._clock())
        merged = Histogram()
        for second, histogram in self._seconds.items():
            if second > now - seconds:
                merged.merge(histogram)
        return merged


def buckets_of(seconds: Sequence[float]) -> NDArray[np.int64]:
    """Index of the bucket that each of `seconds` belongs to; shape `(len(seconds),)`."""
    octaves = np.log2(np.maximum(seconds, _LOWEST_S) / _LOWEST_S)
    return np.minimum((octaves * _PER_OCTAVE).astype(np.int64), _BUCKETS - 1)
