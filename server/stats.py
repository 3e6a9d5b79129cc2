"""Latency distributions in bounded memory: since start, and over the last minute."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Final

from runtime.histogram import Distribution
from server.predictions import Predictions

PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9}
STAGES: Final = ("decode", "queue", "inference", "total")

_MOST_UNSORTED: Final = 1000  # to sort them takes less than a millisecond


class EngineStats:
    """What one engine did. Touched by the event loop's thread only, so it needs no lock.

    Args:
        predictions: counts what it said; None until another's counts are merged in.
        clock: in seconds.

    Attributes:
        predictions: see above.
        batches: how many there were of each size.
        inference: seconds that the engine took for batches of each size, together.
        last: when an image was answered last, to the second, by `time.time`; 0 before the first.
        dropped: images dropped before they were computed, by reason.
        failed: images that the engine failed on.
        hits: images whose answer was kept from before; `stages` and `batches` have the others alone.
        misses: images that were looked for in vain.
    """

    def __init__(
        self, predictions: Predictions | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.predictions = predictions
        self.batches: Counter[int] = Counter()
        self.inference: dict[int, float] = defaultdict(float)
        self.last = 0.0
        self.dropped: Counter[str] = Counter()
        self.failed = 0
        self.hits = 0
        self.misses = 0
        self._clock = clock
        self._stages = {stage: Distribution(clock) for stage in STAGES}
        # Images of one second, not yet sorted into buckets: doing so for all at once takes a twentieth.
        self._second = 0
        self._images: list[tuple[float, float, float, float, Mapping[str, float]]] = []

    @property
    def stages(self) -> Mapping[str, Distribution]:
        """Durations by stage."""
        self._sort()
        return self._stages

    def image(
        self, decode: float, queue: float, inference: float, total: float, device: Mapping[str, float]
    ) -> None:
        """Count one answered image; durations in seconds, `device` those of its batch by stage."""
        second = int(self._clock())
        if second != self._second or len(self._images) == _MOST_UNSORTED:
            self._sort()
            self._second = second
            self.last = time.time()
        self._images.append((decode, queue, inference, total, device))

    def merge(self, other: EngineStats) -> None:
        """Count everything `other` counted."""
        if self.predictions is None:
            self.predictions = deepcopy(other.predictions)
        elif other.predictions is not None and other.predictions.labels == self.predictions.labels:
            self.predictions.merge(other.predictions)
        self.batches.update(other.batches)
        for size, seconds in other.inference.items():
            self.inference[size] += seconds
        self.last = max(self.last, other.last)
        self.dropped.update(other.dropped)
        self.failed += other.failed
        self.hits += other.hits
        self.misses += other.misses
        for stage, distribution in other.stages.items():
            self._stages.setdefault(stage, Distribution(self._clock)).merge(distribution)

    def _sort(self) -> None:
        if not self._images:
            return
        *columns, devices = zip(*self._images, strict=True)
        of_devices: dict[str, list[float]] = {}
        for device in filter(None, devices):
            for stage, value in device.items():
                of_devices.setdefault(stage, []).append(value)
        durations = {**dict(zip(STAGES, columns, strict=True)), **of_devices}
        self._images.clear()
        for stage, values in durations.items():
            self._stages.setdefault(stage, Distribution(self._clock)).add(values, self._second)
