"""Intervals, the Pareto front, and where an axis puts its ticks."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimrt.report.axes import spread_ticks
from trimrt.report.statistics import pareto_front, wilson_interval

points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30)


def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(points)
@settings(deadline=None)
def test_the_front_is_exactly_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front([cost for cost, _ in points], [gain for _, gain in points])
    unbeaten = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    assert sorted(front) == unbeaten


@given(points)
@settings(deadline=None)
def test_the_front_rises_with_its_cost(points: list[tuple[int, int]]) -> None:
    front = [points[index] for index in pareto_front([c for c, _ in points], [g for _, g in points])]
    assert front == sorted(front)


@given(st.integers(1, 100_000).flatmap(lambda images: st.tuples(st.integers(0, images), st.just(images))))
@settings(deadline=None)
def test_an_end_of_the_interval_is_a_share_that_the_count_just_does_not_refute(
    counts: tuple[int, int],
) -> None:
    """Wilson's definition: the observed share is 1.96 of its standard errors away."""
    right, images = counts
    ends = wilson_interval(right, images)
    assert 0 <= ends[0] <= right / images <= ends[1] <= 1
    for end in ends:
        if end not in (0, 1):
            error = math.sqrt(end * (1 - end) / images)
            assert abs(right / images - end) == pytest.approx(1.959964 * error, rel=1e-3)


@given(st.lists(st.floats(-10, 10), max_size=30), st.floats(-10, 10), st.floats(0.1, 10), st.integers(1, 9))
@settings(deadline=None)
def test_ticks_are_in_view_and_apart(positions: list[float], bottom: float, span: float, most: int) -> None:
    chosen = spread_ticks([(position, position) for position in positions], bottom, bottom + span, most)
    assert all(bottom <= tick <= bottom + span for tick in chosen)
    assert all(after - before >= span / most for before, after in itertools.pairwise(chosen))
