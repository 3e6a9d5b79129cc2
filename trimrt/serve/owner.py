"""The process that runs engines for all workers: those on a device, where one process has to own it.

It is a server without HTTP: its schedulers, batches and slots are those of `server/`. They are given the
images of the workers' slots, each as a request of its own: one that fails costs no other its answer.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from uvicorn.loops.auto import auto_loop_factory

from runtime.cuda import DeviceLostError
from runtime.finite import NOT_FINITE
from runtime.health import EngineAwayError, EngineLostError
from runtime.manifest import EngineError, read_manifest
from server.jobs import Job, Result
from server.lifecycle import settle_memory
from server.problems import Problem
from server.registry import Change, Load, MakeDefault, Registry, Unload
from server.scheduler import Scheduler
from server.telemetry import Telemetry
from trimrt import logs
from trimrt.serve.channel import Channel
from trimrt.serve.member import Assignment
from trimrt.serve.participant import Participant
from trimrt.serve.shared_slot import COUNT_BYTES, KEY_BYTES, Answer, SlotMemory, is_shared, key_of

_UNLIMITED: Final = 1 << 30  # the workers' slots bound what may wait


def serve(assignment: Assignment) -> None:
    """Run engines until the supervisor says otherwise, or supervisor and workers are gone."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # see `trimrt.serve.worker`
        signal.signal(ignored, signal.SIG_IGN)
    settings = assignment.settings
    logs.configure(settings.log_level, settings.log_format, access_log=False)
    loop = auto_loop_factory()()
    loop.run_until_complete(Owner(assignment).run())
    loop.close()


class Owner(Participant):
    """The engines that one process runs for all workers."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__()
        self._assignment = assignment
        settings = self._settings = assignment.settings
        self._telemetry = Telemetry()
        self._registry = Registry(
            settings.model_copy(
                update={"workers": 1, "decode_threads": 1, "queue_limit": _UNLIMITED, "cache_mib": 0}
            ),
            self._telemetry,
            on_lost=self._tell_lost if settings.exit_when_lost else None,
        )
        self._links: set[socket.socket] = set()  # one for each worker
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def registry(self) -> Registry:
        """See `Participant`."""
        return self._registry

    @property
    def telemetry(self) -> Telemetry:
        """See `Participant`."""
        return self._telemetry

    async def run(self) -> None:
        """Load the engines, and run them until the end."""
        self._loop = asyncio.get_running_loop()
        self._ending, self._unlinked = asyncio.Event(), asyncio.Event()
        self._supervisor = await Channel.over(
            self._assignment.channel, {**self.methods(), "drain": self._drain}
        )
        talking = asyncio.create_task(self._supervisor.run())
        talking.add_done_callback(lambda _: self._ending.set())
        handed = self._assignment.connections
        handed.setblocking(False)
        self._loop.add_reader(handed, self._take_link, handed)
        try:
            await self._load()
            await self._ending.wait()
            while self._links:  # workers answer what they have accepted, also without a supervisor
                self._unlinked.clear()
                await self._unlinked.wait()
        except ConnectionError:  # the supervisor ended before anything was loaded
            pass
        await self._registry.close()

    async def _load(self) -> None:
        try:
            for folder in self._assignment.packages:
                if is_shared(folder, self._settings):
                    await self._registry.change(Load(folder))
        except EngineError as error:
            await self._supervisor.call("failed", str(error), False)
            return
        settle_memory()
        await self._supervisor.call("loaded")

    async def _drain(self) -> None:
        self._ending.set()

    def _tell_lost(self, error: EngineLostError) -> None:
        self._tasks.append(self._loop.create_task(self._supervisor.call("failed", str(error), True)))

    # --- changes ---------------------------------------------------------------------------------------

    async def _prepare(self, change: Change) -> tuple[str, str] | None:
        part = self._part_of(change)
        self._registry.default = None  # only workers have a default, which may be another's engine
        return None if part is None else await super()._prepare(part)

    def _part_of(self, change: Change) -> Change | None:
        """What of a change is this process's to make."""
        if isinstance(change, MakeDefault):
            return None
        if isinstance(change, Load):
            if is_shared(change.folder, self._settings):
                return change
            name = read_manifest(change.folder, self._settings.trust).name  # which the workers are to run now
        else:
            name = change.name
        return Unload(name) if name in self._registry.loaded else None

    # --- workers and their slots -----------------------------------------------------------------------

    def _take_link(self, handed: socket.socket) -> None:
        try:
            byte, descriptors, _, _ = socket.recv_fds(handed, 1, 1)
        except BlockingIOError:
            return
        if not byte:  # the supervisor is gone
            self._loop.remove_reader(handed)
        for descriptor in descriptors:
            link = socket.socket(fileno=descriptor)
            link.setblocking(False)
            self._links.add(link)
            self._loop.add_reader(link, self._take_slot, link)

    def _take_slot(self, link: socket.socket) -> None:
        try:
            key, descriptors, _, _ = socket.recv_fds(link, KEY_BYTES, 2)
        except BlockingIOError:
            return
        except ConnectionError:
            key, descriptors = b"", []
        if not key:  # the worker has ended
            self._loop.remove_reader(link)
            link.close()
            self._links.remove(link)
            if not self._links:
                self._unlinked.set()
        elif len(descriptors) == 2:
            self._open_slot(key, socket.socket(fileno=descriptors[0]), descriptors[1])
        else:  # too many open files: without its socket's other end, the slot knows that it is not served
            for descriptor in descriptors:
                os.close(descriptor)

    def _open_slot(self, key: bytes, end: socket.socket, memory: int) -> None:
        try:
            scheduler = self._find(key)
            slot = _LentSlot(end, SlotMemory(scheduler.engine.manifest, memory), scheduler)
        except EngineError as error:
            with end, suppress(OSError):
                end.send(Answer(str(error)).to_bytes())
        else:
            slot.open()
        finally:
            os.close(memory)

    def _find(self, key: bytes) -> Scheduler:
        """The engine of that key; of two, the one that is about to replace the other."""
        prepared = [] if self._prepared is None else [self._prepared.scheduler]
        for scheduler in (*prepared, *self._registry.loaded.values()):
            if key_of(scheduler.engine.manifest) == key:
                return scheduler
        raise EngineError("the package has changed since the process that runs it loaded it; load it again")


class _LentSlot:
    """A worker's slot, whose images run through `scheduler`."""

    def __init__(self, end: socket.socket, memory: SlotMemory, scheduler: Scheduler) -> None:
        self._end = end
        self._memory = memory
        self._scheduler = scheduler
        self._jobs: dict[int, Job] = {}  # by row
        self._answer = Answer()

    def open(self) -> None:
        """Run what the worker asks for, until it closes the slot or has ended."""
        self._end.setblocking(False)
        asyncio.get_running_loop().add_reader(self._end, self._take)
        self._send(Answer())

    def _take(self) -> None:
        try:
            count = self._end.recv(COUNT_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            count = b""
        if not count:
            self._close()
            return
        self._answer = Answer()
        try:
            for row in range(int.from_bytes(count, "little")):
                done = partial(self._receive, row)
                image = self._memory.pixels[row]
                self._jobs[row] = self._scheduler.submit([image], math.inf, done, top=0)
        except Problem as problem:  # it is being unloaded; the worker's next batch finds what took its place
            self._send(Answer(problem.detail, EngineAwayError))
            self._close()

    def _receive(self, row: int, outcome: list[Result] | Problem) -> None:
        del self._jobs[row]
        if not isinstance(outcome, Problem):
            (result,) = outcome
            self._memory.logits[row] = result.logits
            self._memory.probabilities[row] = result.probabilities
            timings = {stage: 1000 * seconds for stage, seconds in result.device.items()}
            self._answer = replace(self._answer, timings_ms=timings)
        elif outcome.detail == NOT_FINITE:
            self._memory.logits[row] = math.nan  # the worker tells whose image it is
        else:
            kind = DeviceLostError if self._scheduler.health.is_lost_for_good else EngineError
            self._answer = replace(self._answer, failure=outcome.detail, kind=kind)
        if not self._jobs:
            self._send(self._answer)

    def _send(self, answer: Answer) -> None:
        with suppress(OSError):  # the worker has ended
            self._end.send(answer.to_bytes())

    def _close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._end)
        self._end.close()
        for job in self._jobs.values():
            self._scheduler.drop(job, "cancelled")
        self._jobs.clear()
