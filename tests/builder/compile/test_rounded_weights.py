"""Integer weights: of one scale per output channel, of neighbours that do not saturate; second operands."""

from __future__ import annotations

import numpy as np
import openvino
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from openvino import opset13

from builder.compile.targets.openvino.saturation import make_safe, pair_neighbours
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


def test_a_second_operand_whose_channels_have_scales_of_their_own_takes_the_widest() -> None:
    """No exporter writes one today; it must neither stop a build nor cut values off."""
    first, second = (opset13.parameter([1, 4, 4], np.float32) for _ in range(2))
    most = np.array([1, 2, 4, 8], np.float32).reshape(1, 1, 4)
    quantised = opset13.fake_quantize(second, 0 * most, most, 0 * most, most, levels=256)
    model = openvino.Model([opset13.matmul(first, quantised, False, False)], [first, second])
    make_safe(openvino.Core(), model)
    outer = model.get_results()[0].input_value(0).get_node().input_value(1).get_node()
    ranges = [value.get_node().data.item() for value in outer.input_values()[1:]]
    assert outer.get_type_name() == "FakeQuantize"
    assert ranges == [0, 16, 0, 16]  # 7 bits of 0 to 8
