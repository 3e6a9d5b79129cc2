"""Engines so quick that the event loop runs an image alone itself, rather than hand it to another thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated_engine import Gate
from running import wait_until
from wrapped_engine import load_wrapped

from runtime.health import Health
from runtime.manifest import EngineError
from server.decoding import DecodePool
from server.decoding_limits import DecodingLimits
from server.jobs import Job, Result
from server.problems import Problem
from server.scheduler import Scheduler
from server.settings import Settings
from server.stats import EngineStats

Encode = Callable[..., bytes]

LONG = (600, 600)  # pixels that take longer to decode than a thread to wake
BRIEF, TINY = 0.0005, 0.0001  # seconds


class Machine:
    """A scheduler of a brief engine, the threads that its batches ran on, and what may happen before them."""

    def __init__(self, folder: Path, slots: int, alone_s: float) -> None:
        self.threads: list[int] = []
        self.gate = Gate()  # but for the event loop
        self.event_loop = threading.get_ident()
        self.fail_next = False
        self._pool = DecodePool(1)
        self.scheduler = Scheduler(
            load_wrapped(self._before, slots=slots, on_cpu=True, alone_s=alone_s)(folder),
            self._pool,
            EngineStats(),
            queue_limit=64,
            decoding_limits=DecodingLimits(Settings()),
            health=Health("tiny", 5),
            max_batch_delay=0.0,
            linux_scheduling=True,
        )

    async def start(self, slots: int) -> None:
        await self.scheduler.start()
        await asyncio.to_thread(wait_until, lambda: self.scheduler._backlog.sleeping == slots)
        self.threads.clear()

    async def close(self) -> None:
        self.gate.open()
        if not self.scheduler._retired:
            await self.scheduler.close()
        self._pool.close()

    def _before(self, pixels: np.ndarray, alone: bool) -> None:
        self.threads.append(threading.get_ident())
        if self.fail_next:
            self.fail_next = False
            raise EngineError("the processor fell off")
        if threading.get_ident() != self.event_loop:
            self.gate.enter(pixels, alone)

    def submit(self, *images: bytes) -> asyncio.Future[list[Result] | Problem]:
        answer: asyncio.Future[list[Result] | Problem] = asyncio.get_running_loop().create_future()
        self.job: Job = self.scheduler.submit(images, time.monotonic() + 60, answer.set_result, top=1)
        return answer


@pytest.fixture
def start(engine_dir: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(slots: int = 2, alone_s: float = BRIEF) -> AsyncIterator[Machine]:
        machine = Machine(engine_dir / "tiny-v1", slots, alone_s)
        await machine.start(slots)
        try:
            yield machine
        finally:
            await machine.close()

    return start


async def answered(answer: asyncio.Future[list[Result] | Problem]) -> list[Result] | Problem:
    return await asyncio.wait_for(answer, 20)


@pytest.mark.parametrize("slots", [1, 2])
def test_an_image_alone_runs_on_the_event_loops_thread_and_its_answer_is_right(
    start: Callable[..., Any], encode: Encode, reference: Callable[[bytes], np.ndarray], slots: int
) -> None:
    async def main() -> None:
        async with start(slots) as machine:
            for file in (encode(0), encode(1, "JPEG")):
                (result,) = await answered(machine.submit(file))
                np.testing.assert_allclose(result.probabilities, reference(file), atol=1e-5)
            assert machine.threads == [threading.get_ident()] * 2

    asyncio.run(main())


def test_an_image_alone_among_those_of_a_large_request_runs_on_the_event_loops_thread(
    start: Callable[..., Any], encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.batching._MIXED_S", 60)

    async def main() -> None:
        async with start() as machine:
            await answered(machine.submit(encode(0)))
            machine.gate.close()
            large = machine.submit(*[encode(1)] * 5)
            await asyncio.to_thread(machine.gate.wait_for_arrivals, 1)
            machine.threads.clear()
            assert not isinstance(await answered(machine.submit(encode(2))), Problem)
            assert machine.threads == [machine.event_loop]
            machine.gate.open()
            assert not isinstance(await answered(large), Problem)

    asyncio.run(main())


def test_images_that_come_together_are_for_the_slots(
    start: Callable[..., Any], encode: Encode, reference: Callable[[bytes], np.ndarray]
) -> None:
    files = [encode(seed) for seed in range(4)]

    async def main() -> None:
        async with start() as machine:
            form = await answered(machine.submit(*files))
            singles = [machine.submit(file) for file in files]
            results = list(form)
            for single in singles:
                results += await answered(single)
            for file, result in zip([*files, *files], results, strict=True):
                np.testing.assert_allclose(result.probabilities, reference(file), atol=1e-5)
            assert threading.get_ident() not in machine.threads

    asyncio.run(main())


@pytest.mark.parametrize("slots", [1, 2])
def test_all_images_of_a_tiny_network_run_on_the_event_loops_thread_in_batches(
    start: Callable[..., Any], encode: Encode, reference: Callable[[bytes], np.ndarray], slots: int
) -> None:
    files = [encode(seed) for seed in range(20)]

    async def main() -> None:
        async with start(slots, alone_s=TINY) as machine:
            form = machine.submit(*files[:4])
            singles = [machine.submit(file) for file in files[4:]]
            results = list(await answered(form))
            for single in singles:
                results += await answered(single)
            for file, result in zip(files, results, strict=True):
                np.testing.assert_allclose(result.probabilities, reference(file), atol=1e-5)
            most = machine.scheduler.engine.best_batch
            assert machine.threads == [machine.event_loop] * -(-20 // most)
            assert machine.scheduler.stats.batches[most] == 20 // most

    asyncio.run(main())


def test_images_that_wait_for_the_event_loop_go_to_the_only_slot_once_it_is_at_work(
    start: Callable[..., Any], encode: Encode
) -> None:
    async def main() -> None:
        async with start(slots=1, alone_s=TINY) as machine:
            short, long = machine.submit(encode(1)), machine.submit(encode(0, size=LONG))
            assert not isinstance(await answered(short), Problem)
            assert not isinstance(await answered(long), Problem)
            assert machine.event_loop not in machine.threads

    asyncio.run(main())


def test_large_requests_of_a_tiny_network_are_for_the_slots(
    start: Callable[..., Any], encode: Encode
) -> None:
    async def main() -> None:
        async with start(alone_s=TINY) as machine:
            assert not isinstance(await answered(machine.submit(*[encode(1)] * 5)), Problem)
            assert machine.event_loop not in machine.threads

    asyncio.run(main())


@pytest.mark.parametrize("form", ["PNG", "BMP"], ids=["by its header", "by its size"])
def test_an_image_that_takes_long_to_decode_goes_to_a_slots_thread(
    start: Callable[..., Any], encode: Encode, form: str
) -> None:
    async def main() -> None:
        async with start() as machine:
            assert not isinstance(await answered(machine.submit(encode(0, form, LONG))), Problem)
            assert threading.get_ident() not in machine.threads

    asyncio.run(main())


def test_while_a_slot_is_at_work_the_slots_take_everything(start: Callable[..., Any], encode: Encode) -> None:
    async def main() -> None:
        async with start() as machine:
            machine.gate.close()
            long = machine.submit(encode(0, size=LONG))
            await asyncio.to_thread(machine.gate.wait_for_arrivals, 1)
            short = machine.submit(encode(1))
            await asyncio.to_thread(machine.gate.wait_for_arrivals, 2)
            machine.gate.open()
            await answered(long), await answered(short)
            assert threading.get_ident() not in machine.threads

    asyncio.run(main())


def test_a_failure_is_told_and_the_next_image_runs(start: Callable[..., Any], encode: Encode) -> None:
    async def main() -> None:
        async with start() as machine:
            machine.fail_next = True
            problem = await answered(machine.submit(encode(0)))
            assert isinstance(problem, Problem)
            assert problem.name == "inference-failed"
            assert machine.scheduler.stats.failed == 1
            assert not isinstance(await answered(machine.submit(encode(0))), Problem)
            assert set(machine.threads) == {threading.get_ident()}

    asyncio.run(main())


def test_an_image_that_is_damaged_is_told(start: Callable[..., Any], encode: Encode) -> None:
    async def main() -> None:
        async with start() as machine:
            for file in (encode(1)[:60], b"no image"):
                problem = await answered(machine.submit(file))
                assert isinstance(problem, Problem)
                assert problem.name == "image-damaged"
            assert machine.threads == []
            assert not isinstance(await answered(machine.submit(encode(0))), Problem)

    asyncio.run(main())


def test_an_image_that_nobody_waits_for_is_not_computed(start: Callable[..., Any], encode: Encode) -> None:
    async def main() -> None:
        async with start() as machine:
            machine.submit(encode(0))
            machine.scheduler.drop(machine.job, "cancelled")
            assert not isinstance(await answered(machine.submit(encode(1))), Problem)
            assert machine.scheduler.stats.batches == {1: 1}

    asyncio.run(main())


def test_closing_answers_what_was_admitted(start: Callable[..., Any], encode: Encode) -> None:
    async def main() -> None:
        async with start() as machine:
            answer = machine.submit(encode(0))
            await machine.scheduler.close()
            assert answer.done()
            assert not isinstance(answer.result(), Problem)

    asyncio.run(main())
