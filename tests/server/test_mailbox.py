"""Calls from other threads to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial

import pytest
import uvloop

from server.mailbox import Mailbox

_CALLS = 20_000  # more than the socket has room for


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> asyncio.Runner:
    return asyncio.Runner(loop_factory=request.param)


def test_calls_of_all_threads_are_made_on_the_loop_s_thread_in_their_order(runner: asyncio.Runner) -> None:
    made: list[tuple[str, int, int]] = []

    def call(name: str, number: int) -> None:
        made.append((name, number, threading.get_ident()))

    def leave_all(mailbox: Mailbox, name: str) -> None:
        for number in range(_CALLS):
            mailbox.leave(partial(call, name, number))

    async def main() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        await asyncio.gather(*(asyncio.to_thread(leave_all, mailbox, name) for name in "ab"))
        mailbox.close()

    with runner:
        runner.run(main())
    assert {thread for *_, thread in made} == {threading.get_ident()}
    for sender in "ab":
        assert [number for name, number, _ in made if name == sender] == list(range(_CALLS))


def test_one_call_wakes_a_loop_that_has_nothing_else_to_do(runner: asyncio.Runner) -> None:
    async def main() -> None:
        called = asyncio.Event()
        mailbox = Mailbox(asyncio.get_running_loop())
        await asyncio.to_thread(mailbox.leave, called.set)
        await asyncio.wait_for(called.wait(), timeout=5)
        mailbox.close()

    with runner:
        runner.run(main())


def test_a_call_that_fails_is_told_and_the_next_is_made(runner: asyncio.Runner) -> None:
    told: list[object] = []

    def fail() -> None:
        raise RuntimeError("no")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        called = asyncio.Event()
        mailbox = Mailbox(loop)
        calls: list[Callable[[], None]] = [fail, called.set]
        for call in calls:
            mailbox.leave(call)
        await asyncio.wait_for(called.wait(), timeout=5)
        mailbox.close()

    with runner:
        runner.run(main())
    assert [str(error) for error in told] == ["no"]
