"""The process above the workers: it starts, replaces and stops them, and speaks for all of them together.

Engines on a device are run by one process for all workers, their owner. It is started with the first such
engine, and replaced as workers are.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from models.errors import TrimRTError
from runtime.health import EngineLostError
from runtime.manifest import EngineError
from runtime.watching import Watcher
from server.counts import Counts
from server.problems import Problem
from server.registry import Change, EngineRow, Load
from server.settings import Settings
from trimrt.serve.changes import change_all
from trimrt.serve.connections import Acceptor, Taker
from trimrt.serve.hanging import wait_until_loaded, watch
from trimrt.serve.member import Assignment, Member, start_member, work_as_owner, work_as_worker
from trimrt.serve.shared_slot import AWAY, is_shared
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
        owner: of engines on a device; None: there is none yet, or it has ended and is being replaced.
    """

    def __init__(
        self, settings: Settings, listeners: Sequence[socket.socket], packages: Sequence[Path]
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._state = State(packages)
        self.members: list[Member] = []
        self.owner: Member | None = None
        self._keeping_owner: asyncio.Task[None] | None = None
        self._past = Counts(time.time())  # of workers that have ended
        self._past_owned = Counts(time.time())  # of owners
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
            self._stopping.set()
            if self._acceptor is not None:
                self._acceptor.close()
            for member in self._processes():
                member.kill()
            await asyncio.gather(*(member.ended for member in self._processes()))
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Answer what was accepted, then end; at once when called again, or before anything is served."""
        if self._stopping.is_set() or not self._all_loaded.is_set():
            self._stopping.set()
            for member in self._processes():
                member.kill()
        else:
            self._drain()

    def _processes(self) -> list[Member]:
        return [*self.members, *([] if self.owner is None else [self.owner])]

    # --- the workers, from start to stop ---------------------------------------------------------------

    async def _serve(self) -> None:
        # Looks before what is there is loaded, lest a package come between.
        settings = self._settings
        watcher = Watcher(self._load, settings.engine_dir, settings.trust) if settings.watch else None
        async with self._changing:
            if any(is_shared(folder, settings) for folder in self._state.packages):
                await self._start_owner()
            members = await asyncio.gather(*(self._start_worker() for _ in range(settings.workers)))
        self._all_loaded.set()
        watching = asyncio.create_task(watcher.run(settings.watch_interval_s)) if watcher else None
        try:
            await asyncio.gather(*(self._keep(member, self._start_worker) for member in members))
        finally:
            if watching is not None:
                watching.cancel()
        if self._keeping_owner is not None:  # nobody needs it any more
            if self.owner is not None:
                self.owner.drain()
            await self._keeping_owner

    async def _start_worker(self) -> Member:
        """A new worker that has loaded its engines, or has ended because all are to stop.

        Raises:
            WorkerError: it has ended before.
        """
        with nullcontext() if self.owner is None else self._new_link(self.owner) as link:
            member = await self._begin(work_as_worker, self._methods, link)
        self.members.append(member)
        try:
            await self._wait_until_loaded(member, "worker")
        except WorkerError:
            self.members.remove(member)
            raise
        return member

    async def _start_owner(self) -> Member:
        """A new owner of engines that has loaded them, or has ended because all are to stop.

        Raises:
            WorkerError: it has ended before.
        """
        owner = self.owner = await self._begin(work_as_owner, self._methods_of_owner, None)
        try:
            await self._wait_until_loaded(owner, "owner")
        except WorkerError:
            self.owner = None
            raise
        for member in self.members:
            with self._new_link(owner) as link, suppress(OSError):  # it has ended, and will be replaced
                member.taker.link(link)
        if self._keeping_owner is None:
            self._keeping_owner = asyncio.create_task(self._keep_owner(owner))
        return owner

    @property
    def _is_owner_away(self) -> bool:
        """Whether it has ended, and is being replaced."""
        return self.owner is None and self._keeping_owner is not None

    def _new_link(self, owner: Member) -> socket.socket:
        """A worker's end of a link to the owner, which the caller closes once it is handed over."""
        link, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end, suppress(OSError):  # it has ended, and will be replaced
            owner.taker.link(its_end)
        return link

    async def _begin(
        self,
        work: Callable[[Assignment], None],
        methods: Callable[[Member], Mapping[str, Callable[..., Awaitable[Any]]]],
        link: socket.socket | None,
    ) -> Member:
        try:
            return await start_member(work, self._settings, self._state.packages, methods, link)
        except OSError as error:  # as where there is no room for another process
            raise WorkerError(f"a process could not be started: {error}") from error

    async def _wait_until_loaded(self, member: Member, what: str) -> None:
        watching = asyncio.create_task(watch(member, self._settings.worker_timeout_s))
        member.ended.add_done_callback(lambda _: watching.cancel())
        await wait_until_loaded(member, len(self._state.packages))
        if not member.is_loaded and not self._stopping.is_set():
            raise WorkerError(member.reason)
        log.info("%s ready", what, extra={"pid": member.pid})

    async def _keep(self, member: Member, start: Callable[[], Awaitable[Member]]) -> None:
        """Put another process in the place of one that ends, until all are to stop."""
        while True:
            await member.ended
            self._forget(member)
            if self._stopping.is_set():
                return
            log.error(
                "a process is replaced", extra={"reason": member.reason, "lost_requests": member.in_flight}
            )
            self._past.replaced += 1
            self._past.lost += member.in_flight
            replacement = await self._replace(start)
            if replacement is None:
                return
            member = replacement

    async def _keep_owner(self, owner: Member) -> None:
        try:
            await self._keep(owner, self._start_owner)
        except WorkerError as error:
            self._failure = self._failure or error
            self._stopping.set()

    def _forget(self, member: Member) -> None:
        """Keep what a process that has ended had counted."""
        if member is self.owner:
            self.owner, past = None, self._past_owned
        else:
            self.members.remove(member)
            past = self._past
        if member.counts is not None:
            past.add(replace(member.counts, processes=[], in_flight=0, queues={}, cache=None))

    async def _replace(self, start: Callable[[], Awaitable[Member]]) -> Member | None:
        """A new process; None if all are to stop.

        Raises:
            WorkerError: it could not begin, and there is no worker.
        """
        pause = 0.5
        while not self._stopping.is_set():
            try:
                async with self._changing:
                    return await start()
            except WorkerError as error:
                if not self._is_owner_away and not any(member.is_loaded for member in self.members):
                    raise
                log.error(
                    "a process could not be replaced", extra={"reason": str(error), "again_in_s": pause}
                )
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

    def _methods_of_owner(self, owner: Member) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return {
            "loaded": partial(self._take_owner_loaded, owner),
            "failed": partial(self._take_failure, owner),
        }

    async def _take_owner_loaded(self, owner: Member) -> None:
        owner.set_loaded()

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
        """What all workers counted, also those that have ended: no counter ever falls.

        Batches of engines that have an owner are the owner's.
        """
        await asyncio.gather(*(self._ask_counts(member) for member in self._processes() if member.is_loaded))
        total = _sum([self._past, *(member.counts for member in self.members)])
        owned = _sum([self._past_owned, *([] if self.owner is None else [self.owner.counts])])
        total.processes += owned.processes
        for key, stats in owned.engines.items():
            if key in total.engines:
                total.engines[key].batches = stats.batches
        return total

    async def _ask_counts(self, member: Member) -> None:
        with suppress(ConnectionError, asyncio.TimeoutError):
            member.counts = await asyncio.wait_for(member.channel.call("counts"), _COUNTS_S)

    async def _change(self, change: Change) -> EngineRow:
        """Make a change in all processes or in none, see `server.fleet.Fleet`."""
        async with self._changing:
            if self._stopping.is_set():
                raise Problem("not-ready", "the server is draining")
            if self._is_owner_away:
                raise Problem("not-ready", AWAY, headers={"Retry-After": "1"})
            if self.owner is None and await asyncio.to_thread(self._needs_owner, change):
                try:
                    await self._start_owner()
                except WorkerError as error:
                    raise EngineError(str(error)) from error
            workers = [it for it in self.members if it.is_loaded]
            return await change_all(workers, self.owner, change, self._state)

    def _needs_owner(self, change: Change) -> bool:
        return isinstance(change, Load) and is_shared(change.folder, self._settings)

    async def _load(self, folder: Path) -> None:
        await self._change(Load(folder))


def _sum(counts: Iterable[Counts | None]) -> Counts:
    """All of them together; None: nothing was ever told."""
    total = Counts(time.time())
    for it in counts:
        if it is not None:
            total.add(it)
    return total
