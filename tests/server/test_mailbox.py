"""Messages from threads to the event loop: all arrive, in order, and wake it by a socket where they may."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvloop

from server.mailbox import Mailbox

_MESSAGES = 20_000  # more than the socket has room for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


class AsyncioLoop(asyncio.SelectorEventLoop):
    """Counts its own wake-ups."""

    wake_ups = 0

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> asyncio.Handle:
        self.wake_ups += 1
        return super().call_soon_threadsafe(*arguments, **options)


class UvLoop(uvloop.Loop):
    """Counts its own wake-ups."""

    wake_ups = 0

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> asyncio.Handle:
        self.wake_ups += 1
        return super().call_soon_threadsafe(*arguments, **options)


@pytest.fixture(params=[AsyncioLoop, UvLoop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[AsyncioLoop | UvLoop]:
    loop = request.param()
    yield loop
    loop.close()


class TestMailbox:
    @pytest.mark.parametrize("on_this_core", [True, False])
    def test_messages_arrive_on_the_loops_thread_in_the_order_of_each_sender(
        self, loop: AsyncioLoop, on_this_core: bool
    ) -> None:
        arrived: list[tuple[str, int, int]] = []

        def receive(message: tuple[str, int]) -> None:
            arrived.append((*message, threading.get_ident()))

        def send(mailbox: Mailbox[tuple[str, int]], name: str) -> None:
            for number in range(_MESSAGES):
                mailbox.leave((name, number), on_this_core=on_this_core)

        async def main() -> None:
            mailbox = Mailbox(loop, receive)
            with ThreadPoolExecutor(2) as senders:
                await asyncio.wait(
                    [loop.run_in_executor(senders, send, mailbox, name) for name in "ab"],
                )
            mailbox.close()

        loop.run_until_complete(main())
        assert {thread for *_, thread in arrived} == {threading.get_ident()}
        for sender in "ab":
            assert [number for name, number, _ in arrived if name == sender] == list(range(_MESSAGES))

    @pytest.mark.parametrize(
        ("on_this_core", "sockets", "wake_ups"),
        [(True, True, 0), (False, True, 1), (True, False, 1)],
        ids=["on this core", "elsewhere", "turned off"],
    )
    def test_one_message_wakes_an_idle_loop_by_a_socket_or_by_the_loops_own_means(
        self, loop: AsyncioLoop, on_this_core: bool, sockets: bool, wake_ups: int
    ) -> None:
        async def main() -> None:
            arrived: asyncio.Future[str] = loop.create_future()
            mailbox = Mailbox(loop, arrived.set_result, sockets=sockets)
            before = loop.wake_ups
            sender = threading.Thread(
                target=mailbox.leave, args=("hello",), kwargs={"on_this_core": on_this_core}
            )
            sender.start()
            assert await asyncio.wait_for(arrived, timeout=5) == "hello"
            assert loop.wake_ups - before == wake_ups
            sender.join()
            mailbox.close()

        loop.run_until_complete(main())

    def test_a_message_whose_receipt_fails_does_not_hold_up_the_next(self, loop: AsyncioLoop) -> None:
        told: list[object] = []
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))

        async def main() -> None:
            last: asyncio.Future[None] = loop.create_future()

            def receive(message: str) -> None:
                if message == "bad":
                    raise RuntimeError(message)
                last.set_result(None)

            mailbox = Mailbox(loop, receive)
            for message in ("bad", "good"):
                mailbox.leave(message, on_this_core=True)
            await asyncio.wait_for(last, timeout=5)
            mailbox.close()

        loop.run_until_complete(main())
        assert [str(error) for error in told] == ["bad"]
