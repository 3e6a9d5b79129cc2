"""The collate step: which of the waiting images run now, and how many."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching import Shares, collate
from server.manifest import BatchSizes
from server.scheduler import warmup_sizes


@dataclass
class Image:
    ready_at: float = 0.0
    dies_at: float = math.inf

    def is_dead(self, now: float) -> bool:
        return now >= self.dies_at


def test_an_idle_engine_takes_what_waits_at_once() -> None:
    waiting = deque([Image(), Image()])
    first, second = waiting
    batch, dropped, wake_at = collate(waiting, now=0.0, max_size=8)
    assert batch == [first, second]
    assert (dropped, wake_at, len(waiting)) == ([], math.inf, 0)


def test_the_rest_stays_for_the_next_batch_in_order() -> None:
    images = [Image() for _ in range(5)]
    waiting = deque(images)
    assert collate(waiting, 0.0, 3)[0] == images[:3]
    assert collate(waiting, 0.0, 3)[0] == images[3:]


def test_nothing_waits_nothing_runs() -> None:
    assert collate(deque(), 0.0, 8) == ([], [], math.inf)


def test_the_dead_take_no_place_in_the_batch() -> None:
    dead, alive = Image(dies_at=1.0), Image()
    waiting = deque([dead, alive])
    assert collate(waiting, 2.0, 1) == ([alive], [dead], math.inf)


def test_a_delay_holds_back_a_batch_that_is_not_full() -> None:
    waiting = deque([Image(ready_at=10.0)])
    assert collate(waiting, now=10.0, max_size=2, delay=0.5) == ([], [], 10.5)
    assert len(waiting) == 1
    assert len(collate(waiting, now=10.5, max_size=2, delay=0.5)[0]) == 1


def test_a_delay_does_not_hold_back_a_full_batch() -> None:
    waiting = deque([Image(ready_at=10.0), Image(ready_at=10.0)])
    assert len(collate(waiting, now=10.0, max_size=2, delay=0.5)[0]) == 2


@given(
    st.lists(st.builds(Image, st.floats(-10, 0), st.floats(0, 20))),
    st.floats(0, 20),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 5.0]),
)
def test_no_image_is_lost_doubled_or_reordered(
    images: list[Image], now: float, max_size: int, delay: float
) -> None:
    waiting = deque(images)
    batch, dropped, wake_at = collate(waiting, now, max_size, delay)
    assert len(batch) <= max_size
    assert all(image.is_dead(now) for image in dropped)
    assert not any(image.is_dead(now) for image in batch)
    taken = {id(image) for image in (*batch, *dropped)}
    assert [id(image) for image in images if id(image) not in taken] == [id(image) for image in waiting]
    assert len(batch) + len(dropped) + len(waiting) == len(images)
    assert wake_at == math.inf or (not batch and now < wake_at <= now + delay)
    if delay == 0:
        assert batch or not waiting, "an idle engine was kept waiting"


def test_every_power_of_two_in_the_profile_is_warmed() -> None:
    assert warmup_sizes(BatchSizes(min=1, opt=6, max=12)) == [1, 2, 4, 6, 8, 12]
    assert warmup_sizes(BatchSizes(min=4, opt=4, max=4)) == [4]


def test_or_every_size() -> None:
    assert warmup_sizes(BatchSizes(min=2, opt=4, max=5), every=True) == [2, 3, 4, 5]


class TestShares:
    """Two slots that run 1, 2 or 4 images at once, unless a test says otherwise."""

    @staticmethod
    def shares(load: int = 8, slots: int = 2, runs: tuple[int, ...] = (1, 2, 4), most: int = 8) -> Shares:
        shares = Shares(slots, runs, most)
        shares.begin(load)
        return shares

    @pytest.mark.parametrize(
        ("pending", "images"),
        [(1, 1), (2, 1), (3, 1), (4, 2), (8, 2), (16, 4), (20, 4), (32, 8), (64, 8)],
    )
    def test_half_of_what_is_under_way_waits_and_runs_are_whole(self, pending: int, images: int) -> None:
        assert self.shares(pending).size(pending, at_hand=0, age=0.0) == images

    @pytest.mark.parametrize(("slots", "pending", "images"), [(2, 9, 4), (2, 12, 4), (4, 16, 2), (4, 17, 4)])
    def test_less_than_half_waits_where_each_slot_gets_four(
        self, slots: int, pending: int, images: int
    ) -> None:
        assert self.shares(pending, slots).size(pending, at_hand=0, age=1.0) == images

    def test_clients_that_were_just_answered_count_as_waiting(self) -> None:
        assert self.shares(9).size(5, at_hand=1, age=1.0) == 4

    def test_young_images_run_in_a_larger_batch(self) -> None:
        assert self.shares().size(8, at_hand=4, age=0.1) == 4
        assert self.shares().size(8, at_hand=3, age=0.1) == 2

    def test_those_that_waited_for_long_do_not_run_for_long_too(self) -> None:
        assert self.shares().size(8, at_hand=4, age=0.5) == 2

    def test_but_they_do_once_in_a_while_so_that_a_rhythm_begins(self) -> None:
        shares = self.shares()
        sizes = []
        for _ in range(40):
            sizes.append(shares.size(8, at_hand=6, age=0.5))
            shares.begin(8)
        assert sizes.count(4) == 2

    @pytest.mark.parametrize("load", [4, 5, 6])
    def test_no_slot_takes_what_the_others_would_lack(self, load: int) -> None:
        assert self.shares(load).size(load, at_hand=4, age=0.0) == 2

    def test_clients_that_were_just_answered_count_as_under_way(self) -> None:
        assert self.shares(load=8).size(5, at_hand=4, age=0.0) == 4

    def test_an_engine_of_one_size_gets_what_there_is(self) -> None:
        assert self.shares(runs=(4,)).size(8, at_hand=3, age=0.0) == 2

    @given(
        st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300), st.floats(0, 5)), max_size=20),
        st.integers(1, 8),
        st.sampled_from([(1,), (1, 2, 4), (1, 2, 4, 8, 16, 32), (4,)]),
        st.integers(1, 32),
    )
    def test_it_is_always_an_image_at_least_and_never_more_than_allowed(
        self, calls: list[tuple[int, int, float]], slots: int, runs: tuple[int, ...], most: int
    ) -> None:
        shares = Shares(slots, runs, most)
        for pending, at_hand, age in calls:
            assert 1 <= shares.size(pending, at_hand, age) <= most
            shares.begin(pending)
