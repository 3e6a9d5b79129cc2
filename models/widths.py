"""Which widths a network is to have: those that are worth the most within budgets.

A group is channels that can only be pruned together. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.errors import TrimRTError

_MOST_STEPS: Final = 4  # blocks that go at once, where fewer save nothing

Widths = Mapping[str, int]  # channels by the group's name
Worth = Mapping[str, NDArray[np.float64]]  # of a group's best channels, by how many: shape (channels + 1,)


class BudgetError(TrimRTError):
    """A budget that no widths meet; the message says the least that they take."""


@dataclass(frozen=True)
class Budget:
    """What a network may cost.

    Attributes:
        unit: what is counted, in words.
        most: that it may cost.
        cost: of a network of some widths.
    """

    unit: str
    most: float
    cost: Callable[[Widths], float]


def choose_widths(worth: Worth, budgets: Sequence[Budget], block: int) -> dict[str, int]:
    """The widths that are worth the most within all budgets, as far as a greedy search finds them.

    Channels are taken from where they are worth least for what they save. Then what the budgets have room for
    is given back, the most worth first. Groups that all keep the same share are never worth more.

    Args:
        worth: of all channels that there are; it rises with their number.
        budgets: at least one.
        block: widths are multiples of it, or all of a group's channels.

    Raises:
        BudgetError: even the narrowest network is over a budget.
    """
    require_possible(worth, budgets, block)
    search = _Search(worth, budgets, block)
    found = [search.filled(start) for start in (search.taken(), search.uniform())]
    return max(found, key=lambda widths: worth_of(widths, worth))


def require_possible(worth: Worth, budgets: Sequence[Budget], block: int) -> None:
    """Raise `BudgetError` unless the narrowest network is within all budgets; as for `choose_widths`."""
    narrowest = narrowest_widths(worth, block)
    costs = [(budget, budget.cost(narrowest)) for budget in budgets]
    if missed := [
        f"{budget.most:.4g} {budget.unit} cannot be met: the narrowest network takes {least:.4g}"
        for budget, least in costs
        if least > budget.most
    ]:
        raise BudgetError("; ".join(missed))


def narrowest_widths(worth: Worth, block: int) -> dict[str, int]:
    """One block of each group."""
    return {name: min(block, len(sums) - 1) for name, sums in worth.items()}


def worth_of(widths: Widths, worth: Worth) -> float:
    """Of the best channels of all groups, so many of each."""
    return float(sum(worth[name][width] for name, width in widths.items()))


class _Search:
    """Steps from widths to neighbouring widths."""

    def __init__(self, worth: Worth, budgets: Sequence[Budget], block: int) -> None:
        self._worth, self._budgets = worth, budgets
        self._steps = {  # widths, ascending
            name: [*range(narrowest, len(worth[name]) - 1, block), len(worth[name]) - 1]
            for name, narrowest in narrowest_widths(worth, block).items()
        }

    def taken(self) -> dict[str, int]:
        """From all channels, those taken away that are worth least for what they save."""
        widths = {name: steps[-1] for name, steps in self._steps.items()}
        while excess := self._excess(widths):
            widths = min(self._narrower(widths, excess), key=lambda each: each[0])[1]
        return widths

    def uniform(self) -> dict[str, int]:
        """The widest of the networks whose groups keep the same share of their channels."""
        shares = sorted({step / steps[-1] for steps in self._steps.values() for step in steps})
        low, high = 0, len(shares)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._excess(self._of(shares[middle])) else (middle, high)
        return self._of(shares[low])

    def filled(self, widths: dict[str, int]) -> dict[str, int]:
        """With channels given back, the most worth first, as far as the budgets have room."""
        while wider := max(self._wider(widths), key=lambda each: each[0], default=None):
            widths = wider[1]
        return widths

    def _of(self, share: float) -> dict[str, int]:
        return {
            name: max([step for step in steps if step <= share * steps[-1] + 1e-9], default=steps[0])
            for name, steps in self._steps.items()
        }

    def _excess(self, widths: Widths) -> float:
        """How far over the budgets a network is, as a sum of shares of them."""
        return sum(max(0.0, budget.cost(widths) / budget.most - 1) for budget in self._budgets)

    def _narrower(self, widths: dict[str, int], excess: float) -> Iterator[tuple[float, dict[str, int]]]:
        """Networks of which one group is narrower, and what worth they lose for what they save."""
        for name, steps in self._steps.items():
            place = steps.index(widths[name])
            for width in steps[max(0, place - _MOST_STEPS) : place]:
                narrower = widths | {name: width}
                saved = excess - self._excess(narrower)
                lost = float(self._worth[name][widths[name]] - self._worth[name][width])
                # What saves nothing now may be in the way of what does: it goes last.
                yield (lost / saved if saved > 0 else np.inf), narrower

    def _wider(self, widths: dict[str, int]) -> Iterator[tuple[float, dict[str, int]]]:
        """Networks within the budgets of which one group is wider, and what worth that gives back."""
        for name, steps in self._steps.items():
            for width in steps[steps.index(widths[name]) + 1 :][:1]:
                wider = widths | {name: width}
                if not self._excess(wider):
                    yield float(self._worth[name][width] - self._worth[name][widths[name]]), wider
