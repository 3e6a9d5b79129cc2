"""One of several processes that serve a port: a whole server, for the connections that it is handed."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, cast

from fastapi import FastAPI

from models.images.process import configure_decoders
from runtime.health import EngineLostError
from server.app import create_app
from server.connection import Connection
from server.counts import Counts
from server.fleet import counts_of
from server.registry import Change, EngineRow, Prepared
from server.service import Service, service_of
from trimrt import logs
from trimrt.serve.channel import Channel
from trimrt.serve.draining import DrainingServer
from trimrt.serve.local import LocalConnection
from trimrt.serve.member import Assignment


def serve(assignment: Assignment) -> None:
    """Serve until the supervisor says otherwise, or is gone."""
    # A terminal and systemd send signals to every process of a group; the supervisor alone acts on them.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    settings = assignment.settings
    logs.configure(settings.log_level, settings.log_format, access_log=settings.access_log)
    configure_decoders()
    membership = Membership()
    app = create_app(settings, on_failure=membership.fail, fleet=membership, packages=assignment.packages)
    WorkerServer(app, assignment, membership).run(sockets=[])


class Membership:
    """The fleet as its member sees it, see `server.fleet.Fleet`; the supervisor speaks for the others."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._prepared: Prepared | None = None

    async def join(self, app: FastAPI, channel: socket.socket, drain: Callable[[], None]) -> None:
        """Do as the supervisor says from now on, and `drain` if it is gone."""

        async def start_to_drain() -> None:
            drain()

        self._app = app
        self._supervisor = await Channel.over(
            channel,
            {
                "counts": self._count,
                "prepare": self._prepare,
                "commit": self._commit,
                "discard": self._discard,
                "drain": start_to_drain,
            },
        )
        talking = asyncio.create_task(self._supervisor.run())
        talking.add_done_callback(lambda _: drain())
        self._tasks.append(talking)

    async def tell_answering(self) -> None:
        """This worker takes connections, though its engines may still be loading."""
        with suppress(ConnectionError):
            await self._supervisor.call("answering")

    async def wait_until_all_loaded(self) -> None:
        """See `Fleet`."""
        await self._supervisor.call("loaded", self._service.registry.served())

    async def counts(self) -> Counts:
        """See `Fleet`."""
        return cast("Counts", await self._supervisor.call("counts"))

    async def change(self, change: Change) -> EngineRow:
        """See `Fleet`."""
        return cast("EngineRow", await self._supervisor.call("change", change))

    def fail(self, error: Exception) -> None:
        """Tell the supervisor that this worker cannot serve."""
        lost = isinstance(error, EngineLostError)
        self._tasks.append(asyncio.create_task(self._tell_failure(str(error), lost)))

    async def _tell_failure(self, reason: str, lost: bool) -> None:
        with suppress(ConnectionError):
            await self._supervisor.call("failed", reason, lost)

    @property
    def _service(self) -> Service:
        return service_of(self._app)

    async def _count(self) -> Counts:
        return counts_of(self._service.telemetry, self._service.registry)

    async def _prepare(self, change: Change) -> tuple[str, str]:
        self._prepared = await self._service.registry.prepare(change)
        return self._prepared.engine.name, self._prepared.engine.model_dump_json()

    async def _commit(self) -> EngineRow:
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        return await prepared.commit()

    async def _discard(self) -> None:
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        await prepared.discard()


class _Handed(Connection):
    """A connection that the supervisor accepted, and hears of when it is over."""

    def __init__(self, *arguments: Any, tell_closed: Callable[[], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tell_closed = tell_closed

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._tell_closed()


class _HandedLocal(_Handed, LocalConnection):
    """One over a Unix socket."""


class WorkerServer(DrainingServer):
    """Serves connections that it is handed; the supervisor tells it to drain."""

    def __init__(self, app: FastAPI, assignment: Assignment, membership: Membership) -> None:
        super().__init__(app, assignment.settings)
        self._channel = assignment.channel
        self._connections = assignment.connections
        self._membership = membership
        self._adopting: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        await self._membership.join(self._app, self._channel, self._start_drain)
        await super().startup(sockets)
        self._connections.setblocking(False)
        self._loop.add_reader(self._connections, self._take)
        await self._membership.tell_answering()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        self._take()  # the last ones; whoever comes now is another worker's
        self._loop.remove_reader(self._connections)
        self._connections.shutdown(socket.SHUT_RD)
        if self._adopting:
            await asyncio.wait(self._adopting)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `uvicorn.Server`. Signals are the supervisor's."""

    def _take(self) -> None:
        while True:
            try:
                byte, descriptors, _, _ = socket.recv_fds(self._connections, 1, 1)
            except BlockingIOError:
                return
            if not byte:  # the supervisor is gone
                self._loop.remove_reader(self._connections)
                return
            if not descriptors:  # this process has too many open files
                self._tell_closed()
            for descriptor in descriptors:
                task = self._loop.create_task(self._adopt(socket.socket(fileno=descriptor)))
                self._adopting.add(task)
                task.add_done_callback(self._adopting.discard)

    async def _adopt(self, connection: socket.socket) -> None:
        try:
            kind = _HandedLocal if connection.family == socket.AF_UNIX else _Handed
            await self._loop.connect_accepted_socket(partial(self._protocol, kind), connection)
        except OSError:  # closed already
            connection.close()
            self._tell_closed()

    def _protocol(self, kind: type[_Handed]) -> _Handed:
        return kind(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            tell_closed=self._tell_closed,
        )

    def _tell_closed(self) -> None:
        with suppress(OSError):
            self._connections.send(b"\0")
