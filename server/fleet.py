"""The processes that serve one port together, as one of them sees them."""

from __future__ import annotations

import os
from typing import Protocol

from server.counts import Compared, Counts, Queue
from server.registry import Change, EngineRow, Registry
from server.telemetry import EngineKey, Telemetry


class Fleet(Protocol):
    """All processes that serve together."""

    async def wait_until_all_loaded(self) -> None:
        """This process has loaded its engines; return when all have.

        Raises:
            EngineError: the others serve something else by the same name.
        """

    async def counts(self) -> Counts:
        """What all processes counted, added up."""

    async def change(self, change: Change) -> EngineRow:
        """Make a change in every process, or in none.

        Raises:
            EngineError, Problem: see `Registry.change`.
        """


class Alone:
    """A fleet of one process."""

    def __init__(self, telemetry: Telemetry, registry: Registry) -> None:
        self._telemetry = telemetry
        self._registry = registry

    async def wait_until_all_loaded(self) -> None:
        """See `Fleet`."""

    async def counts(self) -> Counts:
        """See `Fleet`."""
        return counts_of(self._telemetry, self._registry)

    async def change(self, change: Change) -> EngineRow:
        """See `Fleet`."""
        return await self._registry.change(change)


def counts_of(telemetry: Telemetry, registry: Registry) -> Counts:
    """The counts of this process; a view, not a copy."""
    for stats in telemetry.engines.values():
        if stats.predictions is not None:
            stats.predictions.settle()
    queues = {
        EngineKey.of(scheduler.engine.manifest): Queue(
            scheduler.pending, scheduler.queue_limit, scheduler.health.lost is not None
        )
        for scheduler in registry.loaded.values()
    }
    return Counts(
        telemetry.started,
        [os.getpid()],
        in_flight=telemetry.in_flight,
        requests=telemetry.requests,
        engines=telemetry.engines,
        queues=queues,
        default=registry.default,
        shadows={
            EngineKey.of(it.candidate.engine.manifest): Compared(
                it.primary.engine.manifest.name, it.share, it.counts
            )
            for it in registry.shadows.values()
        },
        cache=None if registry.answers is None else registry.answers.held,
    )
