"""What the server counts. The event loop's thread is the only writer and reader, so nothing is locked."""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from starlette.requests import ClientDisconnect

from runtime.manifest import Manifest
from server.problems import Problem
from server.stats import EngineStats

if TYPE_CHECKING:
    from server.jobs import Result


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
        protocol: `predict`, `v2-rest` or `v2-grpc`.
        outcome: `ok`, `invalid` (the client's fault), `rejected` (no room, or not ready), `expired`,
            `cancelled` or `failed` (the server's fault).
        reason: the problem's name; empty when ok.
    """

    protocol: str
    outcome: str
    reason: str


class Observed:
    """What a request tells of itself while it is served."""

    __slots__ = ("manifest", "results")

    def __init__(self) -> None:
        self.manifest: Manifest | None = None
        self.results: Sequence[Result] = ()


class RequestObserver(Protocol):
    """Told of every inference request when it ends, on the event loop's thread."""

    def record(
        self,
        protocol: str,
        headers: Mapping[str, str],
        started: float,
        *,
        outcome: str,
        problem: str,
        manifest: Manifest | None,
        results: Sequence[Result],
    ) -> None:
        """Take note of a request that just ended.

        Args:
            protocol: see `RequestKey`.
            headers: the request's; names in lower case.
            started: when it began, by `time.monotonic`.
            outcome: see `RequestKey`.
            problem: the reason it failed; empty if it did not.
            manifest: of the engine that answered.
            results: its images' results.
        """

    def close(self) -> None:
        """The last request has ended; may block."""


def outcome_of(problem: Problem) -> str:
    """The `RequestKey.outcome` of a request that ended with `problem`."""
    if problem.status in (408, 504):
        return "expired"
    if problem.status in (429, 503):
        return "rejected"
    return "failed" if problem.status >= 500 else "invalid"


class Telemetry:
    """Counters that outlive the engines they count."""

    def __init__(self, observers: Sequence[RequestObserver] = ()) -> None:
        self.started = time.time()
        self.observers = observers
        self.engines: dict[EngineKey, EngineStats] = {}
        self.requests: Counter[RequestKey] = Counter()
        self.in_flight = 0

    def engine(self, manifest: Manifest) -> EngineStats:
        """The statistics of an engine; a reloaded one goes on where it was."""
        return self.engines.setdefault(EngineKey.of(manifest), EngineStats())

    def begin(self) -> float:
        """An inference request begins: now, by `time.monotonic`. It must `end`."""
        self.in_flight += 1
        return time.monotonic()

    def end(self, key: RequestKey, headers: Mapping[str, str], began: float, observed: Observed) -> None:
        """Count a request that ended, and tell the observers of it."""
        self.in_flight -= 1
        self.requests[key] += 1
        for observer in self.observers:
            observer.record(
                key.protocol,
                headers,
                began,
                outcome=key.outcome,
                problem=key.reason,
                manifest=observed.manifest,
                results=observed.results,
            )

    @contextmanager
    def request(self, protocol: str, headers: Mapping[str, str]) -> Iterator[Observed]:
        """Count one inference request, and tell the observers of it, by how the block ends."""
        observed, began = Observed(), self.begin()
        outcome, reason = "ok", ""
        try:
            yield observed
        except Problem as problem:
            outcome, reason = outcome_of(problem), problem.name
            raise
        except (ClientDisconnect, CancelledError):
            outcome, reason = "cancelled", "disconnected"
            raise
        except Exception:
            outcome, reason = "failed", "internal-error"
            raise
        finally:
            self.end(RequestKey(protocol, outcome, reason), headers, began, observed)
