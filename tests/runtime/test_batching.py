"""The collate step: which of the waiting images run now, and how many."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.batching import Shares, collate


@dataclass
class Image:
    ready_at: float = 0.0
    dies_at: float = math.inf

    def is_dead(self, now: float) -> bool:
        return now >= self.dies_at


def test_an_idle_engine_takes_what_waits_at_once() -> None:
    waiting = deque([Image(), Image()])
    first, second = waiting
    assert collate(waiting, now=0.0, max_size=8) == ([first, second], math.inf)
    assert not waiting


def test_the_rest_stays_for_the_next_batch_in_order() -> None:
    images = [Image() for _ in range(5)]
    waiting = deque(images)
    assert collate(waiting, 0.0, 3)[0] == images[:3]
    assert collate(waiting, 0.0, 3)[0] == images[3:]


def test_nothing_waits_nothing_runs() -> None:
    assert collate(deque(), 0.0, 8) == ([], math.inf)


def test_the_dead_take_no_place_in_the_batch() -> None:
    dead, alive = Image(dies_at=1.0), Image()
    waiting = deque([dead, alive])
    assert collate(waiting, 2.0, 1) == ([alive], math.inf)
    assert not waiting


def test_a_delay_holds_back_a_batch_that_is_not_full() -> None:
    waiting = deque([Image(ready_at=10.0)])
    assert collate(waiting, now=10.0, max_size=2, delay=0.5) == ([], 10.5)
    assert len(waiting) == 1
    assert len(collate(waiting, now=10.5, max_size=2, delay=0.5)[0]) == 1


def test_a_delay_counts_from_the_oldest_image() -> None:
    waiting = deque([Image(ready_at=10.0), Image(ready_at=10.4)])
    assert collate(waiting, now=10.4, max_size=3, delay=0.5) == ([], 10.5)


def test_a_delay_counts_from_the_first_that_joined_the_queue_wherever_it_stands() -> None:
    waiting = deque([Image(ready_at=12.0), Image(ready_at=10.0)])
    assert collate(waiting, now=12.0, max_size=3, delay=2.5) == ([], 12.5)


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
    batch, ask_again_at = collate(waiting, now, max_size, delay)
    assert len(batch) <= max_size
    assert not any(image.is_dead(now) for image in batch)
    kept = [*map(id, batch), *map(id, waiting)]
    assert kept == [id(image) for image in images if id(image) in kept], "doubled or reordered"
    assert all(image.is_dead(now) for image in images if id(image) not in kept), "lost"
    assert ask_again_at == math.inf or (not batch and now < ask_again_at <= now + delay)
    if delay == 0:
        assert batch or not waiting, "an idle engine was kept waiting"


class TestShares:
    """Two slots that run 1, 2 or 4 images at once, unless a test says otherwise."""

    @staticmethod
    def shares(slots: int = 2, runs: tuple[int, ...] = (1, 2, 4), most: int = 8) -> Shares:
        return Shares(slots, runs, most)

    @pytest.mark.parametrize(
        ("pending", "images"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2), (8, 4), (9, 4)]
    )
    def test_what_is_under_way_is_divided_into_whole_runs(self, pending: int, images: int) -> None:
        assert self.shares().size(pending, 0.0) == images

    @pytest.mark.parametrize(("pending", "images"), [(10, 4), (16, 4), (20, 4), (31, 4), (32, 8), (64, 8)])
    def test_half_waits_where_each_slot_has_its_largest_run(self, pending: int, images: int) -> None:
        assert self.shares().size(pending, 0.0) == images

    @pytest.mark.parametrize(("slots", "pending", "images"), [(1, 4, 4), (4, 8, 2), (4, 15, 2), (4, 16, 4)])
    def test_among_all_slots(self, slots: int, pending: int, images: int) -> None:
        assert self.shares(slots).size(pending, 0.0) == images

    def test_a_share_of_four_is_a_whole_run_too(self) -> None:
        assert self.shares(1, runs=(1, 2, 8)).size(4, 0.0) == 2

    def test_more_than_four_for_each_slot_wait_even_where_runs_are_larger(self) -> None:
        assert self.shares(runs=(1, 2, 4, 8, 16), most=16).size(16, 0.0) == 4

    def test_clients_that_were_just_answered_count_as_under_way(self) -> None:
        shares = self.shares()
        shares.begin(8)
        assert shares.size(4, 0.0) == 4

    def test_for_two_batches_of_each_slot(self) -> None:
        shares = self.shares()
        for pending in (8, 2, 2, 2):
            shares.begin(pending)
        assert shares.size(2, 0.0) == 4

    def test_but_not_for_long(self) -> None:
        shares = self.shares()
        for pending in (8, 2, 2, 2, 2):
            shares.begin(pending)
        assert shares.size(2, 0.0) == 1

    @pytest.mark.parametrize(
        ("small_at", "large_at", "images"), [(9.5, 9.9, 4), (9.9, 9.5, 4), (8.9, 9.9, 8), (9.9, 8.9, 8)]
    )
    def test_it_stays_at_four_where_small_requests_have_met_large_ones_within_a_second(
        self, small_at: float, large_at: float, images: int
    ) -> None:
        shares = self.shares()
        shares.arrive(True, small_at)
        shares.arrive(False, large_at)
        assert shares.size(64, 10.0) == images

    @pytest.mark.parametrize("small", [True, False])
    def test_requests_of_one_kind_alone_do_not_keep_it_at_four(self, small: bool) -> None:
        shares = self.shares()
        shares.arrive(small, 10.0)
        assert shares.size(64, 10.0) == 8

    def test_an_engine_of_one_size_gets_what_there_is(self) -> None:
        assert self.shares(runs=(4,)).size(6, 0.0) == 3

    @given(
        st.lists(st.integers(1, 300), max_size=20),
        st.integers(1, 8),
        st.sampled_from([(1,), (1, 2, 4), (1, 2, 4, 8, 16, 32), (4,)]),
        st.integers(1, 32),
    )
    def test_it_is_always_an_image_at_least_and_never_more_than_allowed(
        self, loads: list[int], slots: int, runs: tuple[int, ...], most: int
    ) -> None:
        shares = Shares(slots, runs, most)
        for pending in loads:
            assert 1 <= shares.size(pending, 0.0) <= most
            shares.begin(pending)
