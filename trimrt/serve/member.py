"""A worker process, or the owner of engines, as the supervisor sees it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ctypes import c_longlong
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from server.settings import Settings
from trimrt.serve.channel import Channel
from trimrt.serve.connections import Taker

if TYPE_CHECKING:
    from server.counts import Counts

_SLICES: Final = 10  # of the time in which a process has to answer


@dataclass(frozen=True)
class Assignment:
    """What a process is told at its start.

    Attributes:
        settings: the server's.
        packages: folders of the engine packages to load, the default engine's first.
        channel: its end of its channel to the supervisor.
        connections: over which it is handed connections, and links between workers and owner.
        in_flight: in memory that both processes see, where it keeps how many requests it has in hand.
    """

    settings: Settings
    packages: Sequence[Path]
    channel: socket.socket
    connections: socket.socket
    in_flight: c_longlong


class Member:
    """A worker process, or the owner of engines.

    Attributes:
        channel: for calls to it.
        taker: takes connections for it.
        is_answering: it takes connections, though its engines may still be loading.
        is_loaded: it has loaded its engines, and can serve.
        ready: done when it has loaded, or has ended before.
        ended: done when the process has ended.
        failure: why it cannot serve, if it said so, or was killed for a reason.
        counts: what it had counted when it was last asked.
    """

    def __init__(self, process: Any, channel: Channel, taker: Taker, in_flight: c_longlong) -> None:
        loop = asyncio.get_running_loop()
        self.channel = channel
        self.taker = taker
        self.is_answering = False
        self.is_loaded = False
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.failure = ""
        self.counts: Counts | None = None
        self._process = process
        self._in_flight = in_flight
        self._talking = asyncio.create_task(channel.run())
        loop.add_reader(process.sentinel, self._end)

    @property
    def pid(self) -> int:
        """The process's id."""
        return int(self._process.pid)

    @property
    def in_flight(self) -> int:
        """Inference requests that it has in hand, or had when it ended."""
        return self._in_flight.value

    @property
    def reason(self) -> str:
        """Why it ended."""
        code = self._process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return self.failure or f"process {self.pid} ended {how}"

    def set_loaded(self) -> None:
        """It has loaded its engines."""
        self.is_loaded = True
        if not self.ready.done():
            self.ready.set_result(None)

    def drain(self) -> None:
        """Let it answer what it has accepted, and end."""
        self._draining = asyncio.create_task(self.channel.call("drain"))
        self._draining.add_done_callback(lambda task: task.exception())  # it may have ended already

    async def ask(self, method: str, *arguments: Any, within: float) -> Any:
        """Call a method of the process, which is killed if it does not answer within so many seconds.

        Raises:
            ConnectionError: it has ended.
            Exception: what the method raised.
        """
        asking = asyncio.ensure_future(self.channel.call(method, *arguments))
        try:
            for _ in range(_SLICES):  # of which a machine that is suspended meanwhile counts one
                await asyncio.wait([asking], timeout=within / _SLICES)
                if asking.done():
                    return asking.result()
        finally:
            asking.cancel()
        self.kill(f"process {self.pid} did not answer for {within:g} s ({method})")
        raise ConnectionAbortedError(self.failure)

    def kill(self, reason: str = "") -> None:
        """End it at once."""
        self.failure = self.failure or reason
        self._process.kill()

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        self.is_answering = self.is_loaded = False
        self.taker.close()
        for future in (self.ready, self.ended):
            if not future.done():
                future.set_result(None)


async def start_member(
    work: Callable[[Assignment], None],
    settings: Settings,
    packages: Sequence[Path],
    methods: Callable[[Member], Mapping[str, Callable[..., Awaitable[Any]]]],
    link: socket.socket | None = None,
) -> Member:
    """Start a process.

    Args:
        work: what it does: `work_as_worker` or `work_as_owner`.
        settings: the server's.
        packages: see `Assignment`.
        methods: makes what it may call, for the member that it becomes.
        link: its end of the link between worker and owner, which it finds when it begins.
    """
    channel, its_channel = socket.socketpair()
    connections, its_connections = socket.socketpair()
    taker = Taker(connections)
    if link is not None:
        taker.link(link)
    # Not forked: the supervisor's libraries have threads, which a fork loses in the middle of what they do.
    context = get_context("spawn")
    in_flight = context.RawValue(c_longlong)
    assignment = Assignment(settings, packages, its_channel, its_connections, in_flight)
    process = context.Process(target=work, args=(assignment,))
    with its_channel, its_connections:
        process.start()
    answers: dict[str, Callable[..., Awaitable[Any]]] = {}
    member = Member(process, await Channel.over(channel, answers), taker, in_flight)
    answers.update(methods(member))
    return member


def work_as_worker(assignment: Assignment) -> None:
    """Serve connections; see `trimrt.serve.worker`."""
    from trimrt.serve.worker import serve  # not in the supervisor, which needs little memory

    serve(assignment)


def work_as_owner(assignment: Assignment) -> None:
    """Run engines for all workers; see `trimrt.serve.owner`."""
    from trimrt.serve.owner import serve

    serve(assignment)
