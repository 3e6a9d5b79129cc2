"""A worker process, as the supervisor sees it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.settings import Settings
from trimrt.serve.channel import Channel
from trimrt.serve.connections import Taker

if TYPE_CHECKING:
    from server.counts import Counts


@dataclass(frozen=True)
class Assignment:
    """What a worker is told at its start.

    Attributes:
        settings: the server's.
        packages: folders of the engine packages to load, the default engine's first.
        channel: the worker's end of its channel to the supervisor.
        connections: over which it is handed connections.
    """

    settings: Settings
    packages: Sequence[Path]
    channel: socket.socket
    connections: socket.socket


class Member:
    """A worker process.

    Attributes:
        channel: for calls to it.
        taker: takes connections for it.
        is_answering: it takes connections, though its engines may still be loading.
        is_loaded: it has loaded its engines, and can serve.
        ready: done when it has loaded, or has ended before.
        ended: done when the process has ended.
        failure: why it cannot serve, if it said so.
        counts: what it had counted when it was last asked.
    """

    def __init__(self, process: Any, channel: Channel, taker: Taker) -> None:
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
        self._talking = asyncio.create_task(channel.run())
        loop.add_reader(process.sentinel, self._end)

    @property
    def pid(self) -> int:
        """The process's id."""
        return int(self._process.pid)

    @property
    def reason(self) -> str:
        """Why it ended."""
        code = self._process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return self.failure or f"worker process {self.pid} ended {how}"

    def set_loaded(self) -> None:
        """It has loaded its engines."""
        self.is_loaded = True
        if not self.ready.done():
            self.ready.set_result(None)

    def drain(self) -> None:
        """Let it answer what it has accepted, and end."""
        self._draining = asyncio.create_task(self.channel.call("drain"))
        self._draining.add_done_callback(lambda task: task.exception())  # it may have ended already

    def kill(self) -> None:
        """End it at once."""
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
    settings: Settings,
    packages: Sequence[Path],
    methods: Callable[[Member], Mapping[str, Callable[..., Awaitable[Any]]]],
) -> Member:
    """Start a worker process; what it may call is made for the member that it becomes."""
    channel, its_channel = socket.socketpair()
    connections, its_connections = socket.socketpair()
    # Not forked: the supervisor's libraries have threads, which a fork loses in the middle of what they do.
    process = get_context("spawn").Process(
        target=_work, args=(Assignment(settings, packages, its_channel, its_connections),)
    )
    with its_channel, its_connections:
        process.start()
    answers: dict[str, Callable[..., Awaitable[Any]]] = {}
    member = Member(process, await Channel.over(channel, answers), Taker(connections))
    answers.update(methods(member))
    return member


def _work(assignment: Assignment) -> None:
    from trimrt.serve.worker import serve  # not in the supervisor, which needs little memory

    serve(assignment)
