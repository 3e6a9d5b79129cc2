"""Images that wait for a slot, and slots that wait for images."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from running import wait_until

from runtime.batching import Shares
from server.backlog import Backlog
from server.jobs import Image, Job


def images(count: int, *, lifetime: float = 60.0, turn: int = 0, behind: int = 0) -> list[Image]:
    """One request's."""
    now = time.monotonic()
    job = Job(count, now, now + lifetime, lambda _outcome: None, top=0, turn=turn, behind=behind)
    return [Image(job, index, b"") for index in range(count)]


def come(backlog: Backlog, request: list[Image]) -> None:
    """As the scheduler hands a request's images over."""
    backlog.expect(request[0].job)
    backlog.under_way += len(request)
    backlog.put(request)


class Slots:
    """Threads that wait at backlogs, until the test ends."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._backlogs: list[Backlog] = []

    def asleep(self, backlog: Backlog, *, reserve: bool = False) -> Future[list[Image]]:
        """One that has fallen asleep, after all that slept before."""
        self._backlogs.append(backlog)
        before = backlog.sleeping
        slot = self._pool.submit(backlog.wait, reserve=reserve)
        wait_until(lambda: backlog.sleeping == before + 1)
        return slot

    def end(self) -> None:
        for backlog in self._backlogs:
            backlog.close()


@pytest.fixture
def slots() -> Iterator[Slots]:
    with ThreadPoolExecutor(4) as pool:
        it = Slots(pool)
        yield it
        it.end()


def test_what_waits_is_taken_at_once_up_to_a_batch() -> None:
    backlog = Backlog(slots=1, most=4)
    put = images(6)
    backlog.put(put)
    assert backlog.take() == put[:4]
    assert backlog.wait() == put[4:]
    assert backlog.take() == []


def test_an_image_wakes_the_slot_that_fell_asleep_last(slots: Slots) -> None:
    backlog = Backlog(slots=2, most=4)
    first, last = slots.asleep(backlog), slots.asleep(backlog)
    put = images(1)
    backlog.put(put)
    assert last.result(timeout=20) == put
    assert backlog.sleeping == 1
    backlog.close()
    assert first.result(timeout=20) == []


def test_requests_take_turns() -> None:
    backlog = Backlog(slots=1, most=1)
    first, second, third = images(3), images(3), images(1)
    for request in (first, second, third):
        backlog.put(request)
    taken = [backlog.take()[0] for _ in range(7)]
    assert taken == [first[0], second[0], third[0], first[1], second[1], first[2], second[2]]


def test_a_request_of_one_image_waits_for_one_image_of_each_other_request() -> None:
    backlog = Backlog(slots=1, most=4)
    forms = [images(64, turn=1), images(64, turn=1)]
    for form in forms:
        backlog.put(form)
    for _ in range(5):
        backlog.take()
    single = images(1, turn=backlog.round + 1)
    backlog.put(single)
    assert single[0] in backlog.take()


def test_a_request_of_many_images_has_one_taken_in_each_round_however_many_small_ones_come() -> None:
    backlog = Backlog(slots=1, most=1)
    form = images(8, turn=1)
    for request in (form, *(images(1, turn=1) for _ in range(4))):
        backlog.put(request)
    taken = list[Image]()
    for _ in range(8 * 5):
        taken += backlog.take()
        if taken[-1] not in form:  # its client is answered, and sends the next
            backlog.put(images(1, turn=backlog.round + 1))
    assert taken[::5] == form


def test_an_image_whose_turn_has_passed_is_next() -> None:
    backlog = Backlog(slots=1, most=1)
    early, late = images(3, turn=1), images(3, turn=1)
    backlog.put(early)
    backlog.take()
    backlog.take()
    backlog.put(late[:1])  # a pool took its time to decode it
    assert backlog.take() == late[:1]
    assert backlog.round == 2


def test_dead_images_are_never_taken() -> None:
    backlog = Backlog(slots=1, most=4)
    expired, abandoned, alive = images(2, lifetime=0.0), images(1), images(1)
    backlog.put([*expired, *abandoned, *alive])
    abandoned[0].job.over = True
    assert backlog.take() == alive
    assert backlog.waiting == 0


def test_slots_share_what_is_under_way() -> None:
    backlog = Backlog(slots=2, most=8, shares=Shares(2, (1, 2, 4), 8))
    put = images(4)
    backlog.under_way = 4
    backlog.put(put)
    assert [backlog.take(), backlog.take()] == [put[:2], put[2:]]


def test_batches_stay_small_while_small_requests_come_among_large_ones() -> None:
    backlog = Backlog(slots=1, most=16, shares=Shares(1, (1, 2, 4), 16))
    come(backlog, large := images(64))
    assert backlog.take() == large[:16]
    come(backlog, images(1, turn=64))
    assert backlog.take() == large[16:20]


def test_a_small_request_that_comes_first_does_not_wait_for_a_large_ones_images(slots: Slots) -> None:
    backlog = Backlog(slots=2, most=16, shares=Shares(2, (1, 2, 4), 16))
    come(backlog, large := images(64, turn=1))
    come(backlog, small := images(2))
    assert backlog.take() == small
    assert backlog.take() == large[:4]
    come(backlog, later := images(1))
    assert backlog.join(1) == later


def test_one_slot_is_left_for_small_requests_that_come_among_large_ones(slots: Slots) -> None:
    backlog = Backlog(slots=2, most=16, shares=Shares(2, (1, 2, 4), 16))
    come(backlog, small := images(1))
    assert backlog.take(reserve=True) == small
    reserve, other = slots.asleep(backlog, reserve=True), slots.asleep(backlog)
    sleep = backlog._reserve
    come(backlog, large := images(64))
    assert other.result(timeout=20) == large[:4]
    assert backlog.reserve_sleeps
    assert backlog._reserve is sleep  # it was not woken for nothing
    assert backlog.take(reserve=True) == []
    come(backlog, small := images(1, turn=64))
    assert reserve.result(timeout=20) == small
    assert backlog.take() == large[4:8]


def test_the_only_slot_takes_large_requests_too(slots: Slots) -> None:
    backlog = Backlog(slots=1, most=16, shares=Shares(1, (1, 2, 4), 16))
    come(backlog, small := images(1))
    assert backlog.take(reserve=True) == small
    slot = slots.asleep(backlog, reserve=True)
    come(backlog, large := images(64))
    assert slot.result(timeout=20) == large[:4]


def test_without_small_requests_every_slot_takes_large_ones() -> None:
    backlog = Backlog(slots=2, most=16, shares=Shares(2, (1, 2, 4), 16))
    come(backlog, large := images(64))
    assert backlog.take(reserve=True) == large[:16]


def test_late_images_join_a_batch_up_to_its_size() -> None:
    backlog = Backlog(slots=1, most=4)
    put = images(3)
    backlog.put(put)
    assert backlog.join(4) == []
    assert backlog.join(2) == put[:2]


def test_images_for_which_a_slot_has_been_woken_join_no_other_batch(slots: Slots) -> None:
    backlog = Backlog(slots=3, most=4)
    waiting = [slots.asleep(backlog), slots.asleep(backlog)]
    put = images(1)
    backlog.put(put)  # wakes one; the other sleeps on, so there is no need to join
    assert backlog.join(1) == []
    backlog.close()
    assert sorted((slot.result(timeout=20) for slot in waiting), key=len) == [[], put]


def test_a_delay_holds_images_back_until_the_batch_is_full(slots: Slots) -> None:
    backlog = Backlog(slots=1, most=2, delay=60.0)
    slot = slots.asleep(backlog)
    put = images(2)
    backlog.put(put[:1])
    assert backlog.take() == []
    backlog.put(put[1:])
    assert slot.result(timeout=20) == put


def test_a_delay_that_is_over_ends_the_wait() -> None:
    backlog = Backlog(slots=1, most=2, delay=0.05)
    put = images(1)
    backlog.put(put)
    assert backlog.wait() == put
    assert time.monotonic() - put[0].ready_at >= 0.05
    assert backlog.sleeping == 0


def test_others_sleep_says_who_is_alone(slots: Slots) -> None:
    backlog = Backlog(slots=3, most=4)
    first = slots.asleep(backlog)
    assert not backlog.others_sleep
    second = slots.asleep(backlog)
    assert backlog.others_sleep
    backlog.close()
    assert first.result(timeout=20) == second.result(timeout=20) == []


def test_a_closed_backlog_gives_what_is_left_and_then_ends_every_slot() -> None:
    backlog = Backlog(slots=1, most=4)
    put = images(1)
    backlog.put(put)
    backlog.close()
    assert backlog.wait() == put
    assert backlog.wait() == []


@pytest.mark.parametrize("delay", [0.0, 0.001])
def test_every_image_is_taken_once_whatever_the_threads_do(delay: float) -> None:
    backlog = Backlog(slots=3, most=4, delay=delay)
    put = [image for _ in range(500) for image in images(2)]
    taken: list[int] = []

    def slot() -> None:
        while batch := backlog.wait():
            taken.extend(map(id, batch))
            taken.extend(map(id, backlog.join(len(batch))))

    slots = [threading.Thread(target=slot) for _ in range(3)]
    for thread in slots:
        thread.start()
    for first in range(0, len(put), 2):
        backlog.put(put[first : first + 2])
    wait_until(lambda: len(taken) >= len(put))
    backlog.close()
    for thread in slots:
        thread.join(timeout=20)
    assert sorted(taken) == sorted(map(id, put))


def test_a_request_of_low_priority_waits_for_some_rounds_of_others_and_no_longer() -> None:
    backlog = Backlog(slots=1, most=1)
    low = images(1, turn=1, behind=16)
    backlog.put(low)
    taken: list[Image] = []
    for _ in range(40):  # another request is there whenever the slot asks
        backlog.put(images(1, turn=backlog.round + 1))
        taken += backlog.take()
    assert taken.index(low[0]) == 16


def test_a_request_of_low_priority_that_runs_early_puts_nobody_off() -> None:
    backlog = Backlog(slots=1, most=2)
    low = [images(1, turn=1, behind=16)[0] for _ in range(6)]
    for image in low:
        backlog.put([image])
    assert backlog.take() == low[:2]
    other = images(1, turn=backlog.round + 1)
    backlog.put(other)
    assert backlog.take() == [other[0], low[2]]
