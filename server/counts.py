"""What the processes that serve together have counted: `/metrics` and `/stats` show their sum."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from server.answers import Held
from server.shadow import ShadowCounts
from server.stats import EngineStats
from server.telemetry import EngineKey, RequestKey


@dataclass
class Queue:
    """What waits for a loaded engine.

    Attributes:
        pending: images admitted and not yet answered.
        limit: most images that may have to run for a request.
        lost: whether the engine fails on every batch.
    """

    pending: int
    limit: int
    lost: bool


class Compared(NamedTuple):
    """The name of the engine that a shadow runs beside, the share of its images, and what was counted."""

    of: str
    share: float
    counts: ShadowCounts


@dataclass
class Counts:
    """The counts of one process, or of several.

    Attributes:
        started: when the first of them began to count, by `time.time`.
        processes: ids of those that run.
        replaced: how many ended unasked and were replaced.
        lost: inference requests that those had in hand.
        in_flight: inference requests now served.
        requests: those that ended, by how.
        engines: statistics of every engine that was ever loaded.
        queues: of the engines now loaded.
        default: name of the engine for requests that name none.
        shadows: engines that run beside another.
        cache: the answers that are kept; None: none are.
    """

    started: float
    processes: list[int] = field(default_factory=list)
    replaced: int = 0
    lost: int = 0
    in_flight: int = 0
    requests: Counter[RequestKey] = field(default_factory=Counter)
    engines: dict[EngineKey, EngineStats] = field(default_factory=dict)
    queues: dict[EngineKey, Queue] = field(default_factory=dict)
    default: str | None = None
    shadows: dict[EngineKey, Compared] = field(default_factory=dict)
    cache: Held | None = None

    def add(self, other: Counts) -> None:
        """Count everything `other` counted; what `other` holds stays its own."""
        self.started = min(self.started, other.started)
        self.processes += other.processes
        self.replaced += other.replaced
        self.lost += other.lost
        self.in_flight += other.in_flight
        self.requests.update(other.requests)
        for key, stats in other.engines.items():
            self.engines.setdefault(key, EngineStats()).merge(stats)
        for key, queue in other.queues.items():
            ours = self.queues.setdefault(key, Queue(0, 0, lost=False))
            ours.pending += queue.pending
            ours.limit += queue.limit
            ours.lost |= queue.lost
        self.default = other.default or self.default
        self.shadows.update(other.shadows)
        if self.cache is not None and other.cache is not None:
            self.cache = Held(*map(sum, zip(self.cache, other.cache, strict=True)))
        else:
            self.cache = self.cache or other.cache
