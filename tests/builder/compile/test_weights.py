"""Integer weights: of one scale for each output channel, and of neighbours that do not saturate."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from builder.compile.targets.openvino.saturation import pair_neighbours
from builder.weights import LEVELS, quantise

WEIGHTS = arrays.arrays(
    np.float64,
    st.tuples(*(st.integers(1, 5) for _ in range(3))),
    elements=st.floats(-1e3, 1e3, allow_subnormal=False),
)


@given(WEIGHTS, st.integers(1, 127))
def test_no_weight_moves_by_more_than_half_a_step(weights: np.ndarray, levels: int) -> None:
    integers, scale = quantise(weights, levels=levels)
    assert np.abs(integers).max() <= levels
    assert scale.shape == (len(weights), 1, 1)
    assert np.all(np.abs(integers * scale.astype(np.float64) - weights) <= 0.5001 * scale)


@given(WEIGHTS, st.sampled_from([(0, 1), (1, 0), (0, 2)]))
def test_no_two_neighbours_of_one_sign_saturate_in_16_bits(
    weights: np.ndarray, axes: tuple[int, int]
) -> None:
    """In the worst case both activations are 255."""
    integers, scale = pair_neighbours(weights, *axes)
    rows = np.moveaxis(integers.astype(np.int64), axes[1], 0)
    first, second = rows[::2], rows[1::2]
    sums = 255 * (first[: len(second)] + second)
    assert np.all((sums >= -(2**15)) & (sums < 2**15))
    assert np.all(np.abs(integers * scale.astype(np.float64) - weights) <= 0.5001 * scale)


def test_weights_that_are_never_large_neighbours_keep_8_bits() -> None:
    weights = np.array([[1.0, -1.0, 0.5, 0.4, 0.0, 1.0]])
    assert np.abs(pair_neighbours(weights, 0, 1).integers).max() == LEVELS
