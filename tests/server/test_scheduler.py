"""Admission and delivery on the event loop: who is answered with what, and what an end waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from gated_engine import Gate, load_gated
from running import wait_until

from models.preprocessing import plan_loading
from runtime.engine import Engine
from runtime.health import Health
from runtime.manifest import EngineError
from server.decoding import DecodePool
from server.decoding_limits import DecodingLimits
from server.jobs import Result
from server.problems import Problem
from server.scheduler import Scheduler, ServiceTime
from server.settings import Settings
from server.stats import EngineStats

Encode = Callable[..., bytes]
Answer: TypeAlias = "list[Result] | Problem"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is decoded from now on."""
    files: list[bytes] = []

    def noted(data: bytes, *arguments: Any, **options: Any) -> Any:
        files.append(data)
        return plan_loading(data, *arguments, **options)

    monkeypatch.setattr("server.decoding.plan_loading", noted)
    return files


def scheduled(engine: Engine, pool: DecodePool, queue_limit: int) -> Scheduler:
    return Scheduler(
        engine,
        pool,
        EngineStats(),
        queue_limit=queue_limit,
        decoding_limits=DecodingLimits(Settings()),
        health=Health("tiny", 5),
        max_batch_delay=0.0,
        linux_scheduling=True,
    )


@pytest.fixture
def start(engine_dir: Path, gate: Gate) -> Callable[..., Any]:
    """A scheduler behind a closed gate; at the end of the block the gate is open and the engine closed."""

    @asynccontextmanager
    async def start(*, slots: int = 1, on_cpu: bool = True) -> AsyncIterator[Scheduler]:
        engine = load_gated(gate, slots=slots, on_cpu=on_cpu)(engine_dir / "tiny-v1")
        pool = DecodePool(1)
        scheduler = scheduled(engine, pool, queue_limit=12)
        await scheduler.start()
        gate.close()
        try:
            yield scheduler
        finally:
            gate.open()
            if not scheduler._retired:
                await scheduler.close()
            pool.close()

    return start


def submit(scheduler: Scheduler, *images: bytes) -> asyncio.Future[Answer]:
    """One request; the future gets its answer."""
    answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    scheduler.submit(images, time.monotonic() + 60, answer.set_result, top=1)
    return answer


async def arrivals(gate: Gate, batches: int) -> None:
    await asyncio.to_thread(gate.wait_for_arrivals, batches)


async def answered(answer: asyncio.Future[Answer]) -> Answer:
    return await asyncio.wait_for(answer, 20)


async def batch_of(answer: asyncio.Future[Answer]) -> int:
    outcome = await answered(answer)
    assert not isinstance(outcome, Problem)
    return outcome[0].batch_size


def test_jobs_of_one_batch_get_the_results_of_their_own_images_in_their_order(
    start: Callable[..., Any], gate: Gate, encode: Encode, reference: Callable[[bytes], np.ndarray]
) -> None:
    requests = [[encode(0)], [encode(1), encode(2), encode(3)], [encode(4), encode(5)]]

    async def main() -> None:
        async with start() as scheduler:
            blocker = submit(scheduler, encode(9))
            await arrivals(gate, 1)
            answers = [submit(scheduler, *images) for images in requests]
            gate.open()
            await answered(blocker)
            for images, answer in zip(requests, answers, strict=True):
                results = await answered(answer)
                assert not isinstance(results, Problem)
                for image, result in zip(images, results, strict=True):
                    expected = reference(image)
                    np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
                    softmax = np.exp(result.logits) / np.exp(result.logits).sum()
                    np.testing.assert_allclose(softmax, expected, atol=1e-5)
                    assert result.order[0] == expected.argmax()
                    assert result.batch_size > 1

    asyncio.run(main())


def test_a_failed_batch_is_answered_to_its_own_jobs_and_to_no_other(
    start: Callable[..., Any], gate: Gate, encode: Encode, reference: Callable[[bytes], np.ndarray]
) -> None:
    async def main() -> None:
        async with start() as scheduler:
            first = submit(scheduler, encode(0))
            await arrivals(gate, 1)
            doomed = [submit(scheduler, encode(1)), submit(scheduler, encode(2), encode(3))]
            doomed.append(submit(scheduler, encode(4), *(encode(n) for n in range(5, 8))))  # over two batches
            gate.allow(1)
            await arrivals(gate, 2)
            spared = submit(scheduler, encode(9))
            gate.fail_next = True
            gate.open()
            assert await batch_of(first) == 1
            for answer in doomed:
                outcome = await answered(answer)
                assert isinstance(outcome, Problem)
                assert outcome.name == "inference-failed"
            outcome = await answered(spared)
            assert not isinstance(outcome, Problem)
            np.testing.assert_allclose(outcome[0].probabilities, reference(encode(9)), atol=1e-5)
            assert scheduler.pending == 0

    asyncio.run(main())


def test_a_batch_that_fails_counts_against_the_engine_and_a_damaged_image_does_not(
    start: Callable[..., Any], gate: Gate, encode: Encode
) -> None:
    async def main() -> None:
        async with start() as scheduler:
            for _ in range(5):
                assert isinstance(await answered(submit(scheduler, b"no image")), Problem)
            assert (scheduler.stats.failed, scheduler.health.lost) == (0, None)
            for number in range(5):
                gate.fail_next = True
                gate.allow(1)
                assert isinstance(await answered(submit(scheduler, encode(number))), Problem)
            assert scheduler.stats.failed == 5
            assert scheduler.health.lost is not None
            gate.open()
            assert await batch_of(submit(scheduler, encode(0))) == 1
            assert scheduler.health.lost is None

    asyncio.run(main())


def test_a_request_has_its_first_turn_in_the_next_round_behind_those_that_wait_for_it(
    start: Callable[..., Any], gate: Gate, encode: Encode, decoded: list[bytes]
) -> None:
    form = [encode(number) for number in range(1, 7)]

    async def main() -> None:
        async with start() as scheduler:
            answers = [submit(scheduler, encode(0))]
            await arrivals(gate, 1)
            answers.append(submit(scheduler, *form))
            gate.allow(1)
            await arrivals(gate, 2)
            assert decoded == [encode(0), *form[:4]]
            answers.append(submit(scheduler, encode(9)))
            gate.open()
            for answer in answers:
                assert not isinstance(await answered(answer), Problem)
        assert decoded[5:] == [form[4], encode(9), form[5]]

    asyncio.run(main())


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "device"])
def test_a_job_whose_deadline_passed_is_not_computed_even_before_it_is_dropped(
    start: Callable[..., Any], gate: Gate, encode: Encode, on_cpu: bool
) -> None:
    async def main() -> None:
        async with start(on_cpu=on_cpu) as scheduler:
            running = submit(scheduler, encode(0))
            await arrivals(gate, 1)
            late = scheduler.submit([encode(1)], time.monotonic(), pytest.fail, top=1)
            next_one = submit(scheduler, encode(2))
            gate.allow(2)
            assert await batch_of(running) == 1
            assert await batch_of(next_one) == 1
            scheduler.drop(late, "expired")
            assert scheduler.stats.dropped == {"expired": 1}
            assert scheduler.pending == 0

    asyncio.run(main())


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "device"])
def test_a_job_that_was_dropped_is_neither_decoded_nor_computed(
    start: Callable[..., Any], gate: Gate, encode: Encode, decoded: list[bytes], on_cpu: bool
) -> None:
    async def main() -> None:
        async with start(on_cpu=on_cpu) as scheduler:
            running = submit(scheduler, encode(0))
            await arrivals(gate, 1)
            holding, may_go_on = threading.Event(), threading.Event()

            def hold() -> None:
                holding.set()
                assert may_go_on.wait(20)

            scheduler._pool.submit(hold)
            assert await asyncio.to_thread(holding.wait, 20)
            dropped = scheduler.submit([encode(1)], time.monotonic() + 60, pytest.fail, top=1)
            next_one = submit(scheduler, encode(2))
            scheduler.drop(dropped, "cancelled")
            may_go_on.set()
            gate.open()
            assert [await batch_of(running), await batch_of(next_one)] == [1, 1]

    asyncio.run(main())
    assert decoded == [encode(0), encode(2)]


def test_a_request_of_one_image_has_room_beside_requests_that_fill_the_queue(
    start: Callable[..., Any], gate: Gate, encode: Encode
) -> None:
    async def main() -> None:
        async with start() as scheduler:
            image = encode(0)
            forms = [submit(scheduler, *[image] * 6) for _ in range(2)]
            await arrivals(gate, 1)
            with pytest.raises(Problem, match=r"and 6 of its own; .* try again in 1 s"):
                submit(scheduler, *[image] * 6)
            singles = [submit(scheduler, image) for _ in range(10)]
            with pytest.raises(Problem, match="12 images would run before it is answered, and 1 of its own"):
                submit(scheduler, image)
            gate.open()
            for answer in [*forms, *singles]:
                assert not isinstance(await answered(answer), Problem)
            assert await batch_of(submit(scheduler, *[image] * 12)) > 1

    asyncio.run(main())


def test_each_image_of_a_request_takes_room(start: Callable[..., Any], gate: Gate, encode: Encode) -> None:
    async def main() -> None:
        async with start() as scheduler:
            pairs = [submit(scheduler, encode(0), encode(1)) for _ in range(6)]
            with pytest.raises(Problem, match="12 images would run before it is answered, and 2 of its own"):
                submit(scheduler, encode(0), encode(1))
            gate.open()
            for answer in pairs:
                assert not isinstance(await answered(answer), Problem)

    asyncio.run(main())


def test_a_job_that_is_dropped_while_its_batch_runs_leaves_the_others_of_the_batch_alone(
    start: Callable[..., Any], gate: Gate, encode: Encode
) -> None:
    async def main() -> None:
        async with start() as scheduler:
            blocker = submit(scheduler, encode(0))
            await arrivals(gate, 1)
            dropped = scheduler.submit([encode(1)] * 2, time.monotonic() + 60, pytest.fail, top=1)
            other = submit(scheduler, encode(2))
            gate.allow(1)
            await arrivals(gate, 2)
            scheduler.drop(dropped, "cancelled")
            assert (scheduler.pending, scheduler.stats.dropped) == (1, {"cancelled": 2})
            gate.open()
            assert [await batch_of(blocker), await batch_of(other)] == [1, 3]
            assert scheduler.stats.batches == {1: 1, 3: 1}
            assert scheduler.pending == 0

    asyncio.run(main())


def test_a_job_that_was_answered_can_not_be_dropped_any_more(
    start: Callable[..., Any], gate: Gate, encode: Encode
) -> None:
    async def main() -> None:
        async with start() as scheduler:
            gate.open()
            answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            job = scheduler.submit([encode(0)], time.monotonic() + 60, answer.set_result, top=1)
            await answered(answer)
            scheduler.drop(job, "expired")
            assert (scheduler.pending, scheduler.stats.dropped) == (0, {})

    asyncio.run(main())


def test_a_scheduler_computes_while_any_slot_is_at_work(
    start: Callable[..., Any], gate: Gate, encode: Encode
) -> None:
    async def main() -> None:
        async with start(slots=2) as scheduler:
            await asyncio.to_thread(wait_until, lambda: not scheduler.is_computing)
            answer = submit(scheduler, encode(0))
            await arrivals(gate, 1)
            assert scheduler.is_computing
            gate.open()
            await answered(answer)
            await asyncio.to_thread(wait_until, lambda: not scheduler.is_computing)

    asyncio.run(main())


def test_a_request_that_ends_early_gives_its_room_back(
    start: Callable[..., Any], gate: Gate, encode: Encode
) -> None:
    async def main() -> None:
        async with start() as scheduler:
            form = [encode(0)] * 12
            dropped = scheduler.submit(form, time.monotonic() + 60, pytest.fail, top=1)
            await arrivals(gate, 1)
            scheduler.drop(dropped, "cancelled")
            damaged = submit(scheduler, b"damaged", *form[1:])
            gate.open()
            assert isinstance(await answered(damaged), Problem)
            assert not isinstance(await answered(submit(scheduler, *form)), Problem)

    asyncio.run(main())


def test_requests_take_turns_at_being_decoded_ahead_too(
    start: Callable[..., Any], gate: Gate, encode: Encode, decoded: list[bytes]
) -> None:
    async def main() -> None:
        async with start(on_cpu=False) as scheduler:
            may_go_on = threading.Event()
            scheduler._pool.submit(lambda: may_go_on.wait(20))
            answers = [submit(scheduler, *map(encode, numbers)) for numbers in ([0, 1, 2], [3, 4], [5])]
            may_go_on.set()
            gate.open()
            for answer in answers:
                await answered(answer)

    asyncio.run(main())
    assert decoded == [encode(n) for n in (0, 3, 5, 1, 4, 2)]


def test_closing_answers_what_was_admitted_and_still_has_to_be_decoded(
    start: Callable[..., Any], gate: Gate, encode: Encode
) -> None:
    async def main() -> None:
        async with start(on_cpu=False) as scheduler:
            gate.open()
            assert await batch_of(submit(scheduler, encode(0))) == 1
            may_go_on = threading.Event()
            scheduler._pool.submit(lambda: may_go_on.wait(20))
            answer = submit(scheduler, encode(0))
            closing = asyncio.create_task(scheduler.close())
            done, _ = await asyncio.wait([closing], timeout=0.3)
            assert not done
            with pytest.raises(Problem, match="is being unloaded"):
                submit(scheduler, encode(1))
            may_go_on.set()
            await asyncio.wait_for(closing, 20)
            assert answer.done()
            assert await batch_of(answer) == 1

    asyncio.run(main())


def test_closing_waits_for_a_batch_under_way_even_if_nobody_waits_for_its_answer(
    start: Callable[..., Any], gate: Gate, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with start() as scheduler:
            ended: list[str] = []
            monkeypatch.setattr(scheduler.engine, "close", lambda: ended.append("engine"), raising=False)
            job = scheduler.submit([encode(0)], time.monotonic() + 60, pytest.fail, top=1)
            await arrivals(gate, 1)
            scheduler.drop(job, "cancelled")
            assert scheduler.pending == 0
            closing = asyncio.create_task(scheduler.close())
            done, _ = await asyncio.wait([closing], timeout=0.3)
            assert not done
            assert ended == []
            gate.open()
            await asyncio.wait_for(closing, 20)
            assert ended == ["engine"]

    asyncio.run(main())


def test_a_start_that_fails_closes_the_slots_that_did_open(
    engine_dir: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_gated(gate, slots=2, on_cpu=True)(engine_dir / "tiny-v1")
    ended: list[str] = []
    first, open_slot, close = threading.Lock(), engine.open_slot, engine.close

    def open_only_one() -> Any:
        if first.acquire(blocking=False):
            slot = open_slot()
            monkeypatch.setattr(slot, "close", lambda: ended.append("slot"))
            return slot
        raise EngineError("out of memory")

    monkeypatch.setattr(engine, "open_slot", open_only_one)
    monkeypatch.setattr(engine, "close", lambda: (ended.append("engine"), close()), raising=False)

    async def main() -> None:
        pool = DecodePool(1)
        scheduler = scheduled(engine, pool, queue_limit=1)
        with pytest.raises(EngineError, match="out of memory"):
            await scheduler.start()
        pool.close()

    asyncio.run(main())
    assert ended == ["slot", "engine"]


class TestServiceTime:
    def test_it_is_nothing_before_the_first_batch(self) -> None:
        assert ServiceTime().per_image == 0

    def test_the_first_batch_counts_whole(self) -> None:
        service_time = ServiceTime()
        service_time.measure(images=4, began=10.0, ended=12.0)
        assert service_time.per_image == 0.5

    def test_later_ones_move_the_average_by_a_fifth(self) -> None:
        service_time = ServiceTime()
        service_time.measure(images=1, began=10.0, ended=11.0)
        service_time.measure(images=1, began=11.0, ended=13.0)
        assert service_time.per_image == pytest.approx(1.2)

    def test_batches_that_overlap_count_the_time_between_their_ends(self) -> None:
        service_time = ServiceTime()
        for slot in range(50):
            service_time.measure(images=2, began=10.0 + slot, ended=12.0 + slot)
        assert service_time.per_image == pytest.approx(0.5, rel=0.01)
