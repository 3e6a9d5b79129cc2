"""Calls from other threads to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import uvloop
from gated_engine import Gate, load_gated
from running import running, wait_until

from server.mailbox import Mailbox
from server.settings import Settings

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


def test_a_slot_leaves_its_results_in_the_mailbox_while_another_computes(
    engine_dir: Path, encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are the same without it, only later: the event loop would be woken on a busy core."""
    left: list[int] = []
    leave = Mailbox.leave

    def observed(mailbox: Mailbox, call: Callable[[], None]) -> None:
        left.append(threading.get_ident())
        leave(mailbox, call)

    gate = Gate()
    monkeypatch.setattr(Mailbox, "leave", observed)
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0)
    with (
        running(settings, load_gated(gate, slots=2, on_cpu=True)) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        scheduler = server.service.registry.get(None)
        gate.close()
        sent = []
        for arrivals in (1, 2):
            sent.append(pool.submit(server.predict, encode(0)))
            gate.wait_for_arrivals(arrivals)
        gate.allow(1)
        wait_until(lambda: scheduler.pending == len(scheduler._sleeping) == 1)
        assert len(left) == 1
        assert left[0] != threading.get_ident()
        gate.allow(1)
        assert [answer.result().status_code for answer in sent] == [200, 200]
        assert len(left) == 1, "the last one computing wakes the event loop on another core"
