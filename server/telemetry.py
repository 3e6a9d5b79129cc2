"""What the server counts. The event loop's thread is the only writer and reader, so nothing is locked."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from ctypes import c_longlong
from typing import NamedTuple, Protocol

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.auth import Caller
from server.jobs import Result
from server.predictions import Predictions
from server.problems import Problem
from server.stats import EngineStats

log = logging.getLogger("trimrt")


class EngineKey(NamedTuple):
    """What tells one engine's series from another's."""

    engine: str
    version: str
    precision: str
    backend: str

    @classmethod
    def of(cls, manifest: Manifest) -> EngineKey:
        """The key of the engine that `manifest` describes."""
        return cls(manifest.name, manifest.version, manifest.precision, manifest.backend)


class RequestKey(NamedTuple):
    """How one inference request ended.

    Attributes:
        protocol: `predict`, `stream` (each frame), `v2-rest` or `v2-grpc`.
        outcome: `ok`, `invalid` (the client's fault), `rejected` (no room, or not ready), `expired`,
            `cancelled` or `failed` (the server's fault).
        reason: the problem's name; `disconnected`, or `superseded` by a newer frame; empty when ok.
    """

    protocol: str
    outcome: str
    reason: str


class Ended(NamedTuple):
    """An inference request that just ended.

    Attributes:
        key: how it ended.
        caller: who asked; called by whoever wants to know, for over HTTP headers are read each time.
        began: when it began, by `time.monotonic`.
        manifest: of the engine that was asked; None if it did not come to that.
        results: its images' results; empty unless they were computed.
        images: its images, as they came; empty if it did not come to that.
    """

    key: RequestKey
    caller: Callable[[], Caller]
    began: float
    manifest: Manifest | None
    results: Sequence[Result]
    images: Sequence[bytes | Pixels]


class RequestObserver(Protocol):
    """Told of every inference request when it ends, on the event loop's thread."""

    def record(self, request: Ended) -> None:
        """Take note of a request that just ended."""

    def close(self) -> None:
        """The last request has ended; may block."""


def outcome_of(problem: Problem) -> str:
    """The `RequestKey.outcome` of a request that ended with `problem`."""
    if problem.status in (408, 504):
        return "expired"
    if problem.status in (429, 503):
        return "rejected"
    return "failed" if problem.status >= 500 else "invalid"


class Sampling:
    """Which requests leave a trace.

    Attributes:
        every: of so many requests one does; 0: none.
    """

    def __init__(self) -> None:
        self.every = 1
        self._passed = 0

    def takes(self) -> bool:
        """Whether the request that just ended does."""
        self._passed += 1
        if not self.every or self._passed < self.every:
            return False
        self._passed = 0
        return True


class Telemetry:
    """Counters that outlive the engines they count.

    Args:
        observers: told of every request.
        sampling: of the traces; None: there are none.
        in_flight: where the number of requests now served is kept, for a process that outlives this one.
    """

    def __init__(
        self,
        observers: Sequence[RequestObserver] = (),
        sampling: Sampling | None = None,
        in_flight: c_longlong | None = None,
    ) -> None:
        self.started = time.time()
        self.observers = list(observers)
        self.sampling = sampling
        self.engines: dict[EngineKey, EngineStats] = {}
        self.requests: Counter[RequestKey] = Counter()
        self._in_flight = c_longlong() if in_flight is None else in_flight

    @property
    def in_flight(self) -> int:
        """Requests now served."""
        return self._in_flight.value

    def engine(self, manifest: Manifest) -> EngineStats:
        """The statistics of an engine; a reloaded one goes on where it was."""
        stats = self.engines.setdefault(EngineKey.of(manifest), EngineStats())
        if stats.predictions is None or not stats.predictions.is_of(manifest):
            stats.predictions = Predictions(manifest)
        return stats

    def begin(self) -> float:
        """An inference request begins: now, by `time.monotonic`. It must `end`."""
        self._in_flight.value += 1
        return time.monotonic()

    def end(self, key: RequestKey) -> None:
        """Count a request that ended."""
        self._in_flight.value -= 1
        self.requests[key] += 1

    def tell(self, request: Ended) -> None:
        """Tell the observers of a request that ended."""
        for observer in self.observers:
            try:
                observer.record(request)
            except Exception:
                log.exception("an observer of requests failed")
