"""One of several processes that serve a port: a whole server, for the connections that it is handed."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, cast

from fastapi import FastAPI

from models.images.process import configure_decoders
from runtime.engine import Engine
from runtime.health import EngineLostError
from runtime.loading import load_engine
from runtime.manifest import read_manifest
from server.app import create_app
from server.connection import Connection
from server.counts import Counts
from server.registry import Change, EngineRow, Registry, engine_options
from server.service import service_of
from server.settings import Settings
from server.telemetry import Telemetry
from trimrt import logs
from trimrt.serve.channel import Channel
from trimrt.serve.connections import LINK
from trimrt.serve.draining import DrainingServer
from trimrt.serve.local import LocalConnection
from trimrt.serve.member import Assignment
from trimrt.serve.participant import Participant
from trimrt.serve.remote import Link, RemoteEngine
from trimrt.serve.shared_slot import AWAY, is_shared

_AT_ONCE: Final = 4  # images that a slot decodes before it hands them to the owner


def serve(assignment: Assignment) -> None:
    """Serve until the supervisor says otherwise, or is gone."""
    # A terminal and systemd send signals to every process of a group; the supervisor alone acts on them.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    settings = assignment.settings
    logs.configure(settings.log_level, settings.log_format, access_log=settings.access_log)
    configure_decoders()
    membership = Membership()
    app = create_app(
        settings,
        load=partial(_load, settings=settings, link=membership.link),
        on_failure=membership.fail,
        fleet=membership,
        packages=assignment.packages,
        in_flight=assignment.in_flight,
    )
    WorkerServer(app, assignment, membership).run(sockets=[])


def _load(folder: Path, settings: Settings, link: Link) -> Engine:
    if not is_shared(folder, settings):
        return load_engine(folder, engine_options(settings))
    manifest = read_manifest(folder, settings.trust)
    most = 1 if settings.max_batch_delay_ms else _AT_ONCE  # the owner waits, not the workers too
    # While half of the slots wait for the owner, the others decode; those of all workers fill two batches.
    threads = math.ceil(settings.decode_threads / settings.workers)
    rows = math.ceil(manifest.batch.max / settings.workers)
    return RemoteEngine(manifest, link, slots=2 * max(threads, math.ceil(rows / most)), most=most)


class Membership(Participant):
    """The fleet as its member sees it, see `server.fleet.Fleet`; the supervisor speaks for the others.

    Attributes:
        link: to the owner of engines.
    """

    def __init__(self) -> None:
        super().__init__()
        self.link = Link()
        self._tasks: list[asyncio.Task[None]] = []
        self._link_end: socket.socket | None = None

    @property
    def registry(self) -> Registry:
        """See `Participant`."""
        return service_of(self._app).registry

    @property
    def telemetry(self) -> Telemetry:
        """See `Participant`."""
        return service_of(self._app).telemetry

    async def join(
        self,
        app: FastAPI,
        channel: socket.socket,
        take_handed: Callable[[], None],
        drain: Callable[[], None],
    ) -> None:
        """Know the supervisor, and how to do what it will say once this worker answers.

        It says nothing of what it hands over, so before a change `take_handed` is called.
        """

        async def start_to_drain() -> None:
            drain()

        self._app = app
        self._take_handed = take_handed
        self._drain = drain
        self._supervisor = await Channel.over(channel, {**self.methods(), "drain": start_to_drain})

    async def tell_answering(self) -> None:
        """This worker takes connections, though its engines may still be loading.

        From now on it does as the supervisor says, and drains if that is gone.
        """
        talking = asyncio.create_task(self._supervisor.run())
        talking.add_done_callback(lambda _: self._drain())
        self._tasks.append(talking)
        with suppress(ConnectionError):
            await self._supervisor.call("answering")

    async def wait_until_all_loaded(self) -> None:
        """See `Fleet`."""
        await self._supervisor.call("loaded", self.registry.served())

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

    async def _prepare(self, change: Change) -> tuple[str, str] | None:
        self._take_handed()  # the link to an owner that was started for this change
        return await super()._prepare(change)

    def take_link(self, end: socket.socket) -> None:
        """Reach the owner of engines over `end` from now on."""
        self._leave_owner()
        self._link_end = end
        self.link.renew(end)
        self._tell_health(None)
        asyncio.get_running_loop().add_reader(end, self._lose_owner)  # it says nothing, but may end

    def _lose_owner(self) -> None:
        self._leave_owner()
        self._tell_health(AWAY)

    def _leave_owner(self) -> None:
        if self._link_end is not None:
            asyncio.get_running_loop().remove_reader(self._link_end)
            self._link_end = None
            self.link.renew(None)

    def _tell_health(self, away: str | None) -> None:
        if hasattr(self._app.state, "service"):  # else nothing is loaded yet
            for scheduler in self.registry.loaded.values():
                if isinstance(scheduler.engine, RemoteEngine):
                    scheduler.health.away = away


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
        self._loop = asyncio.get_running_loop()
        await self._membership.join(self._app, self._channel, self._take, self._start_drain)
        self._connections.setblocking(False)
        self._take()  # the link to the owner, without which no engine of its is loaded
        await super().startup(sockets)
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
            if byte == LINK:
                for descriptor in descriptors:
                    self._membership.take_link(socket.socket(fileno=descriptor))
                continue
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
