"""The order of the classes: by falling logit, equal ones by number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from runtime.ranking import ranked

# Few values, so that many are equal; and any others.
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
FEW = [-np.inf, -2.5, -1.0, -0.0, 0.0, 1.0, SMALLEST, -SMALLEST]
LOGITS = st.sampled_from(FEW) | st.floats(width=32, allow_nan=False)


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=LOGITS),
)
def test_it_is_the_stable_order_of_falling_logits(logits: NDArray[np.float32]) -> None:
    many = np.tile(logits, 101 // logits.shape[1] + 1)  # of which most are equal to others
    for of in (logits, many):
        before, classes = of.copy(), of.shape[1]
        stable = np.argsort(-of, axis=1, kind="stable")
        for count in {*range(min(classes, 12) + 1), classes}:
            np.testing.assert_array_equal(ranked(of, count), stable[:, :count])
        np.testing.assert_array_equal(of, before)


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_a_thousand_classes_of_a_batch(count: int) -> None:
    logits = np.random.default_rng(0).normal(size=(8, 1000)).astype(np.float32).round(1)
    stable = np.argsort(-logits, axis=1, kind="stable")
    np.testing.assert_array_equal(ranked(logits, count), stable[:, :count])


def test_what_is_infinitely_unlikely_is_ranked_too() -> None:
    logits = np.array([[-np.inf, 1, -np.inf, 2], [4, 3, 2, 1]], np.float32)
    np.testing.assert_array_equal(ranked(logits, 4), [[3, 1, 0, 2], [0, 1, 2, 3]])
    np.testing.assert_array_equal(ranked(np.array([[-2.5, -np.inf]], np.float32), 2), [[0, 1]])
    np.testing.assert_array_equal(ranked(np.full((1, 200), -np.inf, np.float32), 3), [[0, 1, 2]])


@pytest.mark.parametrize("count", [3, 6])
def test_rows_of_a_larger_array_may_be_given(count: int) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    for rows in (logits[::2, :6], logits[::2, :200]):
        np.testing.assert_array_equal(ranked(rows, count), np.argsort(-rows, axis=1)[:, :count])
