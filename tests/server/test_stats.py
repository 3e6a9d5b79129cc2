"""Percentiles from log buckets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.histogram import Distribution, Histogram
from server.stats import STAGES, EngineStats

DURATIONS = st.lists(st.floats(1e-6, 100), min_size=1, max_size=200)


@given(DURATIONS, st.floats(0.1, 100))
def test_a_percentile_is_within_2_2_percent(durations: list[float], percent: float) -> None:
    histogram = Histogram()
    histogram.add(durations)
    exact = float(np.percentile(durations, percent, method="inverted_cdf"))
    assert histogram.percentile(percent) == pytest.approx(max(exact, 7.8e-7), rel=0.0222)


@given(DURATIONS)
def test_prometheus_buckets_count_what_is_below_their_bound(durations: list[float]) -> None:
    histogram = Histogram()
    histogram.add(durations)
    for bound, count in histogram.cumulative():
        below = sum(seconds < bound * 0.999 for seconds in durations)
        assert below <= count <= sum(seconds < bound * 1.001 for seconds in durations)


def test_prometheus_buckets_resolve_a_tenth_of_a_millisecond_to_five_seconds() -> None:
    bounds = [bound for bound, _ in Histogram().cumulative()]
    assert bounds[0] == pytest.approx(1e-4)
    assert bounds[-1] > 5
    assert max(high / low for low, high in pairwise(bounds)) < 1.42


def test_an_empty_histogram_has_no_percentiles() -> None:
    assert Histogram().percentile(50) is None


def test_what_is_older_than_a_minute_is_only_in_the_total() -> None:
    now = 1000.0
    stats = EngineStats(clock=lambda: now)
    stats.image(0.1, 0.1, 0.1, 0.5, {})
    now += 59
    stats.image(0.1, 0.1, 0.1, 0.1, {})
    distribution = stats.stages["total"]
    assert distribution.recent().count == 2
    assert distribution.recent(10).count == 1
    now += 1
    assert distribution.recent().count == 1
    assert distribution.total.count == 2


def test_every_image_is_counted_once_however_often_it_is_asked() -> None:
    now = 1000.0
    stats = EngineStats(clock=lambda: now)
    for count in range(1, 6):
        stats.image(0.001, 0.002, 0.003, 0.006, {"compute": 0.0025} if count > 2 else {})
        now += 0.4
        stages = stats.stages
        assert {stage: stages[stage].total.count for stage in STAGES} == dict.fromkeys(STAGES, count)
        assert stages["decode"].recent().count == count
    assert stages["compute"].total.count == 3
    assert stages["inference"].total.sum == pytest.approx(5 * 0.003)
    assert stages["queue"].recent().percentile(50) == pytest.approx(0.002, rel=0.0222)


def test_memory_is_bounded_however_long_it_runs() -> None:
    now = 0.0
    distribution = Distribution(clock=lambda: now)
    for step in range(10_000):
        now = step
        distribution.add([1e-6 * 1.01 ** (step % 2000)], step)
    assert len(distribution._seconds) <= 60
    assert len(distribution.total.counts) <= 432


def test_images_are_sorted_a_thousand_at_a_time_so_that_nobody_waits_long_for_it() -> None:
    stats = EngineStats(clock=lambda: 0.5)
    for _ in range(2500):
        stats.image(0.001, 0.001, 0.001, 0.003, {"copy": 0.0005})
        assert len(stats._images) <= 1000
    assert {stage: it.total.count for stage, it in stats.stages.items()} == dict.fromkeys(
        (*STAGES, "copy"), 2500
    )
