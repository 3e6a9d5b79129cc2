"""The widths that are worth the most within budgets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.widths import Budget, BudgetError, Worth, choose_widths, worth_of

BLOCK = 8
NAMES = ("stem", "inner", "last")


def staircase(widths: Mapping[str, int]) -> float:
    """Milliseconds of a chain of layers whose kernels compute a block of channels at a time."""
    blocks = [-(-widths[name] // BLOCK) for name in NAMES]
    return 0.1 + sum(0.01 * one * other for one, other in zip([1, *blocks], [*blocks, 1], strict=True))


def every_share(channels: Mapping[str, int]) -> list[dict[str, int]]:
    """All networks whose groups keep the same share of their channels, in whole blocks."""
    return [
        {name: max(min(BLOCK, all_), int(share * all_) // BLOCK * BLOCK) for name, all_ in channels.items()}
        for share in np.linspace(0.01, 1, 100)
    ]


@st.composite
def worths(draw: st.DrawFn) -> Worth:
    """Sums or logarithms of sums, of groups of different widths and scales."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    concave = draw(st.booleans())
    worth = {}
    for name in NAMES:
        scores = np.sort(generator.exponential(size=draw(st.integers(1, 12)) * BLOCK))[::-1]
        sums = np.concatenate([[1e-9], scores.cumsum()])
        worth[name] = 10.0 ** draw(st.integers(-2, 2)) * (np.log(sums) if concave else sums)
    return worth


@settings(deadline=None)
@given(worth=worths(), share=st.floats(0, 1), least=st.floats(0, 1))
def test_budgets_hold_and_no_equal_share_of_all_groups_is_worth_more(
    worth: Worth, share: float, least: float
) -> None:
    channels = {name: len(sums) - 1 for name, sums in worth.items()}
    narrowest = {name: min(BLOCK, width) for name, width in channels.items()}
    times = staircase(narrowest), staircase(channels)
    most_channels = max(sum(narrowest.values()), least * sum(channels.values()))
    budgets = [
        Budget("ms", times[0] + share * (times[1] - times[0]), staircase),
        Budget("channels", most_channels, lambda widths: sum(widths.values())),
    ]
    chosen = choose_widths(worth, budgets, BLOCK)
    assert all(budget.cost(chosen) <= budget.most for budget in budgets)
    assert all(narrowest[name] <= width <= channels[name] for name, width in chosen.items())
    assert all(width % BLOCK == 0 for width in chosen.values())
    possible = [
        worth_of(widths, worth)
        for widths in every_share(channels)
        if all(budget.cost(widths) <= budget.most for budget in budgets)
    ]
    assert worth_of(chosen, worth) >= max(possible) - 1e-9


def worth_each(channels: int, value: float = 1.0) -> NDArray[np.float64]:
    """Of channels that are all worth the same."""
    return value * np.arange(channels + 1)


def test_channels_go_where_they_are_worth_least_for_what_they_cost() -> None:
    worth = {"dear": worth_each(64), "cheap": worth_each(64), "precious": worth_each(64, 9.0)}
    prices = {"dear": 4, "cheap": 1, "precious": 4}
    budget = Budget("", 400, lambda widths: sum(prices[name] * width for name, width in widths.items()))
    assert choose_widths(worth, [budget], BLOCK) == {"dear": 16, "cheap": 64, "precious": 64}


def test_a_step_that_saves_nothing_alone_is_part_of_a_longer_one() -> None:
    # Kernels that compute 32 channels at a time: one block of 8 less costs as much.
    budget = Budget("ms", 2, lambda widths: -(-widths["only"] // 32))
    assert choose_widths({"only": worth_each(96)}, [budget], BLOCK) == {"only": 64}


def test_a_budget_with_room_for_all_channels_takes_none() -> None:
    worth = {name: worth_each(20) for name in NAMES}
    budget = Budget("ms", 1000, staircase)
    assert choose_widths(worth, [budget], BLOCK) == dict.fromkeys(NAMES, 20)


def test_a_budget_that_no_network_is_within_names_the_least() -> None:
    worth = {name: worth_each(64) for name in NAMES}
    with pytest.raises(BudgetError, match=r"0\.05 ms cannot be met: the narrowest network takes 0\.14$"):
        choose_widths(worth, [Budget("ms", 0.05, staircase), Budget("ms", 9, staircase)], BLOCK)
