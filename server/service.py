"""The parts of one running application, in one typed object."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.applications import Starlette

from runtime.manifest import EngineError
from server.auth import Caller, require_key
from server.bodies import BodyMemory
from server.fleet import Fleet
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.problems import Problem
from server.rates import RateLimit
from server.registry import EngineRow, Load, Registry, readable
from server.settings import Settings
from server.telemetry import Telemetry
from server.v2.regions import Regions


@dataclass(frozen=True, slots=True)
class Service:
    """What all requests to an application share.

    Attributes:
        rates: of each key; None: there is no limit.
        regions: of shared memory, in which clients on this machine may lay tensors.
        large_work: takes large bodies apart and renders large answers, one at a time; the memory that this
            takes for a moment is taken once, whatever number of clients asks for it.
        loading: ends when the engines named in `settings` are loaded, or one of them failed.
    """

    settings: Settings
    lifecycle: Lifecycle
    body_memory: BodyMemory
    rates: RateLimit | None
    telemetry: Telemetry
    registry: Registry
    fleet: Fleet
    metrics: Metrics
    large_work: Executor
    regions: Regions
    loading: asyncio.Task[None]

    def check_ready(self) -> None:
        """Raise the problem `not-ready` unless new work is wanted and can be done."""
        self.lifecycle.check_ready()
        self.registry.check_health()

    async def load(self, name: str) -> EngineRow:
        """Load the newest package of that name, see `Load`, in every process.

        Raises:
            Problem: `engine-not-found` or `engine-refused`.
        """
        folder = await self.registry.find(name)
        try:
            return await self.fleet.change(Load(folder))
        except EngineError as error:
            raise Problem("engine-refused", readable(str(error))) from None


def service_of(app: Starlette) -> Service:
    """The parts of `app`; they exist from the start of its lifespan."""
    service: Service = app.state.service
    return service


def _of_request(request: Request) -> Service:
    return service_of(request.app)


Served = Annotated[Service, Depends(_of_request)]


def _managed(request: Request, service: Served) -> Service:
    require_key(Caller.over_http(request.scope), service.settings)
    return service


Managed = Annotated[Service, Depends(_managed)]  # for those who may manage the server
