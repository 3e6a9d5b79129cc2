"""A process that has engines, as the supervisor commands it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

from server.counts import Counts
from server.fleet import counts_of
from server.registry import Change, EngineRow, Prepared, Registry
from server.telemetry import Telemetry
from trimrt.serve.remote import RemoteEngine


class Participant(ABC):
    """A process that takes part in every change of the engines; see `methods`."""

    def __init__(self) -> None:
        self._prepared: Prepared | None = None
        self._batches = 0  # that had ended when it was last asked
        self._stalled_since = time.monotonic()

    @property
    @abstractmethod
    def registry(self) -> Registry:
        """Its engines."""

    @property
    @abstractmethod
    def telemetry(self) -> Telemetry:
        """What it counts."""

    def methods(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """What the supervisor may call."""
        return {
            "ping": self._ping,
            "counts": self._count,
            "prepare": self._prepare,
            "commit": self._commit,
            "discard": self._discard,
        }

    async def _ping(self) -> float:
        """For how long slots of this process have been at work and no batch has ended, seconds."""
        here = [it for it in self.registry.loaded.values() if not isinstance(it.engine, RemoteEngine)]
        batches = sum(it.stats.batches.total() + it.stats.failed for it in here)
        if batches != self._batches or not any(it.is_computing for it in here):
            self._batches, self._stalled_since = batches, time.monotonic()
        return time.monotonic() - self._stalled_since

    async def _count(self) -> Counts:
        return counts_of(self.telemetry, self.registry)

    # In a change that is not this process's, nothing is prepared.

    async def _prepare(self, change: Change) -> tuple[str, str] | None:
        self._prepared = await self.registry.prepare(change)
        manifest = self._prepared.scheduler.engine.manifest
        return manifest.name, manifest.model_dump_json()

    async def _commit(self) -> EngineRow | None:
        prepared, self._prepared = self._prepared, None
        return None if prepared is None else await prepared.commit()

    async def _discard(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await prepared.discard()
