"""The process above the workers: it starts, replaces and stops them, and speaks for all of them together."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from models.errors import TrimRTError
from runtime.health import EngineLostError
from runtime.watching import Watcher
from server.counts import Counts
from server.problems import Problem
from server.registry import Change, EngineRow, Load
from server.settings import Settings
from trimrt.serve.changes import change_all
from trimrt.serve.connections import Acceptor, Taker
from trimrt.serve.member import Member, start_member
from trimrt.serve.state import State

log = logging.getLogger("trimrt.workers")

_LONGEST_PAUSE_S: Final = 30.0  # between attempts to replace a worker
_COUNTS_S: Final = 2.0  # a worker that does not tell by then has counted what it told last


class WorkerError(TrimRTError):
    """A worker that could not begin to serve; the message says why."""


class Supervisor:
    """`settings.workers` processes that serve `listeners` together.

    Args:
        settings: the server's.
        listeners: bound, not yet listening.
        packages: folders of the engine packages to begin with, the default engine's first.

    Attributes:
        members: the workers.
    """

    def __init__(
        self, settings: Settings, listeners: Sequence[socket.socket], packages: Sequence[Path]
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._state = State(packages)
        self.members: list[Member] = []
        self._past = Counts(time.time())  # of workers that have ended
        self._failure: TrimRTError | None = None
        self._acceptor: Acceptor | None = None

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            WorkerError: a worker could not begin to serve, or cannot go on.
            EngineLostError: an engine is lost, and `settings` say to end then.
        """
        self._changing = asyncio.Lock()  # the state, by a change or by a new worker that takes it over
        self._all_loaded = asyncio.Event()
        self._stopping = asyncio.Event()
        try:
            await self._serve()
        finally:
            if self._acceptor is not None:
                self._acceptor.close()
            for member in self.members:
                member.kill()
            await asyncio.gather(*(member.ended for member in self.members))
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Answer what was accepted, then end; at once when called again, or before anything is served."""
        if self._stopping.is_set() or not self._all_loaded.is_set():
            self._stopping.set()
            for member in self.members:
                member.kill()
        else:
            self._drain()

    # --- the workers, from start to stop ---------------------------------------------------------------

    async def _serve(self) -> None:
        # Looks before what is there is loaded, lest a package come between.
        settings = self._settings
        watcher = Watcher(self._load, settings.engine_dir, settings.trust) if settings.watch else None
        async with self._changing:
            members = await asyncio.gather(*(self._start() for _ in range(settings.workers)))
        self._all_loaded.set()
        watching = asyncio.create_task(watcher.run(settings.watch_interval_s)) if watcher else None
        try:
            await asyncio.gather(*map(self._keep, members))
        finally:
            if watching is not None:
                watching.cancel()

    async def _start(self) -> Member:
        """A new worker that has loaded its engines, or has ended because all are to stop.

        Raises:
            WorkerError: it has ended before.
        """
        try:
            member = await start_member(self._settings, self._state.packages, self._methods)
        except OSError as error:  # as where there is no room for another process
            raise WorkerError(f"a worker could not be started: {error}") from error
        self.members.append(member)
        await member.ready
        if not member.is_loaded and not self._stopping.is_set():
            self.members.remove(member)
            raise WorkerError(member.reason)
        log.info("worker ready", extra={"pid": member.pid})
        return member

    async def _keep(self, member: Member) -> None:
        """Put another worker in the place of one that ends, until all are to stop."""
        while True:
            await member.ended
            self.members.remove(member)
            if member.counts is not None:
                self._past.add(replace(member.counts, processes=[], in_flight=0, queues={}))
            if self._stopping.is_set():
                return
            log.error("a worker is replaced", extra={"reason": member.reason})
            self._past.replaced += 1
            replacement = await self._replace()
            if replacement is None:
                return
            member = replacement

    async def _replace(self) -> Member | None:
        """A new worker; None if all are to stop.

        Raises:
            WorkerError: it could not begin, and there is no other worker.
        """
        pause = 0.5
        while not self._stopping.is_set():
            try:
                async with self._changing:
                    return await self._start()
            except WorkerError as error:
                if not any(member.is_loaded for member in self.members):
                    raise
                log.error("a worker could not be replaced", extra={"reason": str(error), "again_in_s": pause})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return None

    def _drain(self) -> None:
        self._stopping.set()
        for member in self.members:
            if member.is_loaded:
                member.drain()
            else:
                member.kill()

    def _takers(self) -> list[Taker]:
        """Workers that can serve; at the start all that answer, if only that they are not ready."""
        starting = not self._all_loaded.is_set()
        return [it.taker for it in self.members if it.is_loaded or (starting and it.is_answering)]

    # --- what a worker may call ------------------------------------------------------------------------

    def _methods(self, member: Member) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return {
            "answering": partial(self._take_answering, member),
            "loaded": partial(self._take_loaded, member),
            "failed": partial(self._take_failure, member),
            "counts": self._count,
            "change": self._change,
        }

    async def _take_answering(self, member: Member) -> None:
        """A worker answers; until the first does, connections are refused."""
        member.is_answering = True
        if self._acceptor is None:
            self._acceptor = Acceptor(self._listeners, self._takers)

    async def _take_loaded(self, member: Member, served: Mapping[str, tuple[Path, str]]) -> None:
        """A worker has loaded its engines; returns when all have."""
        self._state.check(served)
        member.set_loaded()
        await self._all_loaded.wait()

    async def _take_failure(self, member: Member, reason: str, lost: bool) -> None:
        """A worker cannot serve: it does not begin to, or it did and all are to end."""
        if not member.is_loaded:
            member.failure = reason
            member.kill()
        elif self._failure is None:
            self._failure = EngineLostError(reason) if lost else WorkerError(reason)
            self._drain()

    async def _count(self) -> Counts:
        """What all workers counted, also those that have ended: no counter ever falls."""
        await asyncio.gather(*(self._ask_counts(member) for member in self.members if member.is_loaded))
        total = Counts(self._past.started)
        total.add(self._past)
        for member in self.members:
            if member.counts is not None:
                total.add(member.counts)
        return total

    async def _ask_counts(self, member: Member) -> None:
        with suppress(ConnectionError, asyncio.TimeoutError):
            member.counts = await asyncio.wait_for(member.channel.call("counts"), _COUNTS_S)

    async def _change(self, change: Change) -> EngineRow:
        """Make a change in all workers or in none, see `server.fleet.Fleet`."""
        async with self._changing:
            if self._stopping.is_set():
                raise Problem("not-ready", "the server is draining")
            return await change_all([it for it in self.members if it.is_loaded], change, self._state)

    async def _load(self, folder: Path) -> None:
        await self._change(Load(folder))
