"""Two take turns, and neither is always first."""

from __future__ import annotations

import pytest

from benchmarks.load import Round
from benchmarks.turns import Turn, round_lengths, take_turns


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [(8, [2, 2, 2, 2]), (20, [5, 5, 5, 5]), (4, [1, 1, 1, 1]), (2, [1, 1]), (1, [1]), (0.3, [1])],
)
def test_rounds_share_the_seconds(seconds: float, lengths: list[int]) -> None:
    assert round_lengths(seconds) == lengths


def test_what_comes_first_alternates_and_warm_ups_do_not_count() -> None:
    order: list[tuple[str, float]] = []

    def turn(name: str) -> Turn:
        def load(seconds: float) -> Round:
            order.append((name, seconds))
            return Round(requests=len(order), seconds=seconds, latencies=[], cpu_seconds=0)

        return load

    first, second = take_turns(turn("a"), turn("b"), seconds=8, warm_up=1)

    assert order[:2] == [("a", 1), ("b", 1)]
    assert order[2:] == [(name, 2) for name in "abbaabba"]
    assert [done.requests for done in first] == [3, 6, 7, 10]  # places in the order
    assert [done.requests for done in second] == [4, 5, 8, 9]
