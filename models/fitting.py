"""Fitting a network into a budget: widths are chosen by predictions, and tried out where it is to run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from pydantic import BaseModel, Field
from torch import nn

from models.evaluation import count_macs, count_parameters
from models.files import replace_file
from models.groups import ChannelGroups
from models.latency import LatencyError, LatencyPredictor, LatencyTable
from models.preprocessing import Preprocessing
from models.promise import UNITS, Cost, Device, Kind, Promise
from models.widths import (
    Budget,
    Widths,
    Worth,
    choose_widths,
    narrowest_widths,
    require_possible,
    worth_of,
)

_TRIES: Final = 3
_FULL: Final = 0.97  # share of a budget from which it is not worth another try
_LEAST_FACTOR: Final = 0.5  # a device that is faster than its table may have been timed in a lucky moment
_WEIGHT_BYTES: Final = {"int8": 1, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Trial:
    """What an engine of a network takes.

    Attributes:
        latency_ms: of a batch; None: it runs on another machine.
        size_mb: of its weights.
    """

    latency_ms: float | None
    size_mb: float


class TargetDevice(Protocol):
    """Where a network is to run."""

    def open_table(
        self, network: nn.Module, name: str, spec: Preprocessing, file: Path, other: Path | None
    ) -> LatencyTable:
        """The latency table of this architecture.

        Args:
            network: with any weights.
            name: of the architecture.
            spec: input size.
            file: of a table of this machine, which is made if nobody gave one.
            other: another run's, which is taken over if it is of such a network.

        Raises:
            LatencyError: there is none, and it cannot be made.
        """

    def try_out(self, network: nn.Module, spec: Preprocessing, table: LatencyTable | None) -> Trial:
        """Build an engine as the table's were, and measure it; the weights do not matter."""


class Fit(BaseModel):
    """Widths within a budget."""

    widths: dict[str, int] = Field(description="of all groups that are pruned")
    promise: Promise = Field(description="what the network then costs")
    fingerprint: str = Field(default="", description="of what they were chosen for")


def load_fit(file: Path, fingerprint: str) -> Fit | None:
    """What `save_fit` left in a file; None: nothing, or for something else."""
    try:
        fit = Fit.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return fit if fit.fingerprint == fingerprint else None


def save_fit(file: Path, fingerprint: str, fit: Fit) -> None:
    """Keep widths, which depend on measured times, for a run that is interrupted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as new:
        text = fit.model_copy(update={"fingerprint": fingerprint}).model_dump_json()
        new.write_text(text, encoding="utf-8")


class Fitter:
    """Finds widths for networks of one architecture, and learns from each that is tried out."""

    def __init__(
        self,
        network: nn.Module,
        spec: Preprocessing,
        budget: Mapping[Kind, float],
        block: int,
        table: LatencyTable | None,
        device: TargetDevice | None,
    ) -> None:
        """Look at the unpruned network.

        Args:
            network: with any weights, in evaluation mode and on the CPU.
            spec: input size.
            budget: what the network may cost.
            block: widths are multiples of it; a table has its own.
            table: of latencies; needed if the budget is one.
            device: tries networks out; None: predictions have to do.

        Raises:
            LatencyError: the table is unfinished, or of another network.
            PruningError: the network cannot be pruned.
        """
        self.budget, self.table = budget, table
        self._spec, self._device = spec, device
        self._block = table.block if table is not None else block
        self._predictor = LatencyPredictor(table) if table is not None else None
        self._factors: dict[Kind, float] = {}
        prices = _Prices(network, spec, table, self._predictor)
        if table is not None and (difference := table.difference(prices.groups.channels, prices.macs)):
            raise LatencyError(f"the latency table is of another network ({table.network}): {difference}")
        self._unpruned = prices
        self._full = {kind: prices.of(kind, prices.groups.channels) for kind in budget}

    def require_possible(self) -> None:
        """Raise `BudgetError` if no widths are within the budget."""
        worth = self._worth(self._unpruned.groups)
        require_possible(worth, self._budgets(self._unpruned, worth, self.budget), self._block)

    def on_the_way(self, share: float) -> dict[Kind, float]:
        """The budget at a share of the way from the unpruned network."""
        return {
            kind: full * (min(self.budget[kind], full) / full) ** share if share < 1 else self.budget[kind]
            for kind, full in self._full.items()
        }

    def fit(self, network: nn.Module, asked: Mapping[Kind, float], *, tried: bool) -> Fit:
        """Choose widths that are worth the most within what is asked.

        Args:
            network: in evaluation mode and on the CPU; not changed.
            asked: a budget, all of whose kinds are the fitter's.
            tried: whether the network is tried out, and the prediction corrected where it is off.

        Raises:
            BudgetError: no widths are within it.
        """
        prices = _Prices(network, self._spec, self.table, self._predictor)
        worth = self._worth(prices.groups)
        fits: list[Fit] = []
        while len(fits) < (_TRIES if tried else 1):
            budgets = self._budgets(prices, worth, asked)
            widths = choose_widths(worth, budgets, self._block)
            costs = {
                kind: Cost(asked=asked[kind], predicted=round(budget.cost(widths), 6))
                for kind, budget in zip(asked, budgets, strict=True)
            }
            if tried:
                costs = self._measured(network, widths, costs)
                self._correct(prices, worth, widths, costs)
            fits.append(Fit(widths=widths, promise=Promise(costs=costs, device=self._described(asked))))
            used = _used(fits[-1])
            if used is None or _FULL <= used <= 1 or (used < 1 and widths == _all(worth)):
                break
        within = [fit for fit in fits if (_used(fit) or 0) <= 1]
        if within:
            return max(within, key=lambda fit: worth_of(fit.widths, worth))
        return min(fits, key=lambda fit: _used(fit) or 0)

    def _worth(self, groups: ChannelGroups) -> Worth:
        """Of the groups that are pruned: those whose price is known."""
        known = None if self.table is None else {group.name for group in self.table.groups}
        return {name: sums for name, sums in groups.worth().items() if known is None or name in known}

    def _budgets(self, prices: _Prices, worth: Worth, asked: Mapping[Kind, float]) -> list[Budget]:
        """Costs as predicted, of which all that is beyond the narrowest network's is corrected."""
        narrowest = narrowest_widths(worth, self._block)
        return [
            Budget(
                UNITS[kind],
                most,
                partial(_corrected, prices, kind, prices.of(kind, narrowest), self._factors.get(kind, 1.0)),
            )
            for kind, most in asked.items()
        ]

    def _measured(self, network: nn.Module, widths: Widths, costs: Mapping[Kind, Cost]) -> dict[Kind, Cost]:
        pruned = copy.deepcopy(network)
        ChannelGroups(pruned, self._spec).prune(widths)
        found: dict[Kind, float | None] = {"macs": count_macs(pruned, self._spec.height, self._spec.width)}
        if self._device is not None and costs.keys() - found:
            trial = self._device.try_out(pruned, self._spec, self.table)
            found |= {"latency_ms": trial.latency_ms, "size_mb": trial.size_mb}
        return {kind: cost.model_copy(update={"measured": found.get(kind)}) for kind, cost in costs.items()}

    def _correct(self, prices: _Prices, worth: Worth, widths: Widths, costs: Mapping[Kind, Cost]) -> None:
        for kind, cost in costs.items():
            least = prices.of(kind, narrowest_widths(worth, self._block))
            beyond = prices.of(kind, widths) - least
            if cost.measured is not None and beyond > 0:
                self._factors[kind] = max(_LEAST_FACTOR, (cost.measured - least) / beyond)

    def _described(self, asked: Mapping[Kind, float]) -> Device | None:
        if self.table is None or "latency_ms" not in asked:
            return None
        return Device.model_validate(self.table.model_dump(include=set(Device.model_fields)))


class _Prices:
    """What a network of fewer channels would cost, by predictions."""

    def __init__(
        self,
        network: nn.Module,
        spec: Preprocessing,
        table: LatencyTable | None,
        predictor: LatencyPredictor | None,
    ) -> None:
        self.groups = ChannelGroups(network, spec)
        self._predictor = predictor
        self._timed = [] if table is None else [group.name for group in table.groups]
        self._bytes = _WEIGHT_BYTES[table.precision if table is not None else "int8"]
        self._parameters = count_parameters(network)
        self.macs = count_macs(network, spec.height, spec.width)

    def of(self, kind: Kind, widths: Widths) -> float:
        """The price of one kind."""
        if kind == "macs":
            return self.macs - self.groups.saved_macs(widths)
        if kind == "size_mb":
            return self._bytes * (self._parameters - self.groups.saved_parameters(widths)) / 1e6
        assert self._predictor is not None, "a latency has a table"
        whole = self.groups.channels
        return self._predictor.predict({name: widths.get(name, whole[name]) for name in self._timed})


def _corrected(prices: _Prices, kind: Kind, least: float, factor: float, widths: Widths) -> float:
    return least + factor * (prices.of(kind, widths) - least)


def _used(fit: Fit) -> float | None:
    """The largest share of what was asked that was measured; None: nothing was."""
    shares = [cost.measured / cost.asked for cost in fit.promise.costs.values() if cost.measured is not None]
    return max(shares, default=None)


def _all(worth: Worth) -> dict[str, int]:
    return {name: len(sums) - 1 for name, sums in worth.items()}
