"""The default workspace: a share of what is free, and of a Jetson's shared memory a smaller one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from builder.compile.targets.tensorrt.memory import LARGEST, MIB, SMALLEST, WITHOUT_GPU, default_workspace


def test_without_a_gpu_it_is_fixed():
    assert default_workspace(None, shared=False) == WITHOUT_GPU


def test_a_graphics_card_gives_half():
    assert default_workspace(6000 * MIB, shared=False) == 3000 * MIB


def test_a_jetson_gives_a_quarter():
    assert default_workspace(6000 * MIB, shared=True) == 1500 * MIB


@given(st.integers(2 * SMALLEST, 1 << 40), st.booleans())
def test_it_is_never_more_than_half_of_what_is_free(free, shared):
    assert SMALLEST <= default_workspace(free, shared=shared) <= min(free // 2, LARGEST)
