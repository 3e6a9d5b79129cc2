"""The latency table: what a network of any widths takes on one machine, by networks that were timed there.

A group is channels that can only be pruned together. With all groups at their narrowest a network takes its
least time. Widening one group adds to that; widening two that meet in a layer adds something more, because a
layer's time grows with the product of its inputs and outputs. Few layers meet three groups, so these
differences add up to the time of any network; a few whole ones correct the sum. This module imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import TrimRTError, faults

_PER_GROUP: Final = 8  # widths of each group that are timed
_PER_PAIR: Final = (0.5, 1.0)  # shares of the channels of two groups that are timed together
_CHECKS: Final = 12
_CHECK_SPREAD: Final = 0.2  # of the shares of channels in every other check
_SAME: Final = 1.03  # times that differ by less are the same
_MOST_TIMES: Final = 8
_OTHER_HEAD: Final = 0.01  # share of the work; a few classes more or less hardly change the latency

Widths = Mapping[str, int]  # channels by the group's name; groups that are not named are at their narrowest
Times = Mapping[frozenset[tuple[str, int]], float]  # milliseconds, by the items of a network's widths


class LatencyError(TrimRTError):
    """A latency table that cannot be used; the message says what is wrong and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(_Strict):
    """Channels that can only be pruned together."""

    name: str = Field(description="of its first layer")
    channels: int = Field(ge=1, description="of the network as it was timed")
    layers: tuple[str, ...] = Field(description="that make these channels")


class Timed(_Strict):
    """A network that was timed, several times.

    Whatever else a machine does makes networks slower, never faster. So the least time counts, as soon as it
    was reached twice.
    """

    widths: dict[str, int] = Field(description="of the groups that are not at their narrowest")
    times_ms: list[float] = Field(min_length=1, description="least of each turn, milliseconds of a batch")

    @property
    def ms(self) -> float:
        """The least time of a batch, milliseconds."""
        return min(self.times_ms)

    @property
    def settled(self) -> bool:
        """Whether it need not be timed again."""
        least, *others = sorted(self.times_ms)
        return len(others) + 1 >= _MOST_TIMES or bool(others and others[0] <= _SAME * least)


class LatencyTable(_Strict):
    """What networks of one architecture take on one machine."""

    format: Literal[1] = 1
    created_at: datetime
    trimrt_version: str
    network: str
    structure: str = Field(description="hash of the operations and shapes of the graph that was narrowed")
    macs: int | None = Field(description="multiply-accumulates for an image, of all channels")
    backend: str
    backend_version: str
    precision: str
    batch: int = Field(ge=1)
    machine: str = Field(description="processor, GPU or board, as its system names it")
    cores: int = Field(ge=1, description="that the processes of this machine may use")
    power: str | None = Field(default=None, description="power mode and clocks of a Jetson")
    block: int = Field(ge=1, description="channels that the kernels compute at a time")
    groups: list[Group] = Field(min_length=1)
    pairs: list[tuple[str, str]] = Field(description="groups that meet in a layer")
    timed: list[Timed] = []

    def difference(self, channels: Widths, macs: int) -> str | None:
        """In words, in what a network differs from the table's; None: as far as can be told, in nothing.

        Args:
            channels: of all groups of the network.
            macs: multiply-accumulates for an image; groups alone do not tell how large their maps are.
        """
        for group in self.groups:
            if channels.get(group.name) != group.channels:
                here = channels.get(group.name, "no")
                return f"here {group.name} has {here} channels that can be pruned, there {group.channels}"
        if self.macs is not None and abs(macs / self.macs - 1) > _OTHER_HEAD:
            here, there = (f"{count / 1e6:,.1f}" for count in (macs, self.macs))
            return (
                "its input size, stem or number of classes is another; an image takes "
                f"{here} million multiply-accumulates here, {there} there"
            )
        return None

    def narrowest(self, group: Group) -> int:
        """Least width of a group."""
        return min(self.block, group.channels)

    def networks(self) -> list[dict[str, int]]:
        """Those that predictions are made of, as `Timed.widths`; the first is the narrowest."""
        return [{}, *self._of_one_group(), *self._of_two_groups()]

    def checks(self) -> list[dict[str, int]]:
        """Others, from all channels to few, that predictions are held against."""
        draw, checks = random.Random(0), []
        for number in range(_CHECKS):
            share, spread = 1 - number / _CHECKS, _CHECK_SPREAD if number % 2 else 0.0
            wanted = {
                group: (share + draw.uniform(-spread, spread)) * group.channels for group in self.groups
            }
            blocks = {group: max(1, round(width / self.block)) for group, width in wanted.items()}
            widths = {group: min(self.block * count, group.channels) for group, count in blocks.items()}
            checks.append(
                {group.name: width for group, width in widths.items() if width > self.narrowest(group)}
            )
        return [widths for widths in checks if len(widths) > 2]

    def missing(self) -> list[dict[str, int]]:
        """Those of `networks` and `checks` that are to be timed, or to be timed again."""
        settled = {_key(timed.widths) for timed in self.timed if timed.settled}
        return [widths for widths in (*self.networks(), *self.checks()) if _key(widths) not in settled]

    @property
    def progress(self) -> float:
        """Share of the work that is done, if no network has to be timed more than twice."""
        turns = sum(2 if timed.settled else 1 for timed in self.timed)
        return turns / (2 * (len(self.networks()) + len(self.checks())))

    def times(self) -> Times:
        """Of all networks that were timed."""
        return {_key(timed.widths): timed.ms for timed in self.timed}

    def with_times(self, times: Iterable[tuple[Widths, float]]) -> LatencyTable:
        """The table with one more time of some networks, in milliseconds."""
        known = {_key(timed.widths): timed for timed in self.timed}
        for widths, ms in times:
            before = known[_key(widths)].times_ms if _key(widths) in known else []
            known[_key(widths)] = Timed(widths=dict(widths), times_ms=[*before, round(ms, 6)])
        return self.model_copy(update={"timed": list(known.values())})

    def _of_one_group(self) -> Iterator[dict[str, int]]:
        for group in self.groups:
            for width in self.widths(group):
                yield {group.name: width}

    def _of_two_groups(self) -> Iterator[dict[str, int]]:
        groups = {group.name: group for group in self.groups}
        for pair in self.pairs:
            for widths in product(*(self.paired_widths(groups[name]) for name in pair)):
                yield dict(zip(pair, widths, strict=True))

    def widths(self, group: Group) -> list[int]:
        """Widths beyond the narrowest in whole blocks, evenly spaced; the last is all channels."""
        first = self.narrowest(group) + self.block
        steps = [
            min(width, group.channels) for width in range(first, group.channels + self.block, self.block)
        ]
        every = max(1, -(-len(steps) // _PER_GROUP))
        return sorted(steps[::-1][::every])

    def paired_widths(self, group: Group) -> list[int]:
        """Those of `widths` that are nearest to some shares of the channels."""
        known, wanted = self.widths(group), [share * group.channels for share in _PER_PAIR]
        nearest = (min(known, key=lambda width: abs(width - each), default=None) for each in wanted)
        return sorted({width for width in nearest if width is not None})


class LatencyPredictor:
    """Predicts what a network takes, from the table's timed networks."""

    def __init__(self, table: LatencyTable) -> None:
        """Take the table apart.

        Raises:
            LatencyError: it is unfinished.
        """
        if table.missing():
            raise LatencyError(
                "the latency table is unfinished; `trimrt measure-layers` with the same arguments goes on"
            )
        self._table = table
        self._groups = {group.name: group for group in table.groups}
        self._narrowest = {group.name: table.narrowest(group) for group in table.groups}
        times = table.times()
        self._least = times[_key({})]
        self._singles = {name: self._single(name, times) for name in self._groups}
        self._pairs = {pair: self._pair(pair, times) for pair in table.pairs}

        self._checked = [(self._sum(widths), times[_key(widths)]) for widths in table.checks()]
        self._exponent = _exponent(self._least, self._checked)

    @property
    def errors(self) -> list[float]:
        """How far predictions for the table's checks are off, as shares of the measured times.

        Each is corrected by the others alone.
        """
        found = []
        for place, (added_up, measured) in enumerate(self._checked):
            others = [*self._checked[:place], *self._checked[place + 1 :]]
            corrected = self._least * (added_up / self._least) ** _exponent(self._least, others)
            found.append(corrected / measured - 1)
        return found

    def predict(self, widths: Widths) -> float:
        """Milliseconds of a batch.

        Args:
            widths: by group; what is no multiple of the block counts as the next one.

        Raises:
            LatencyError: a group that the table does not have.
        """
        if unknown := sorted(set(widths) - set(self._groups)):
            raise LatencyError(f"the latency table has no group {unknown[0]}; it is of another network")
        return float(self._least * (self._sum(widths) / self._least) ** self._exponent)

    def _sum(self, widths: Widths) -> float:
        """What the differences add up to."""
        full = {name: self._whole(name, widths.get(name, least)) for name, least in self._narrowest.items()}
        ms = self._least
        for name, (known, added) in self._singles.items():
            ms += float(np.interp(full[name], known, added))
        for (first, second), grid in self._pairs.items():
            ms += grid.at(full[first], full[second])
        return max(ms, self._least)

    def _whole(self, name: str, width: int) -> int:
        """The width in whole blocks that a kernel computes."""
        block = self._table.block
        return min(-(-width // block) * block, self._groups[name].channels)

    def _single(self, name: str, times: Times) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Widths of one group that were timed, ascending, and what each adds to the least time."""
        widths = self._table.widths(self._groups[name])
        added = [times[_key({name: width})] - self._least for width in widths]
        return np.array([self._narrowest[name], *widths]), np.array([0.0, *added])

    def _pair(self, pair: tuple[str, str], times: Times) -> _Grid:
        """What two groups add together, beyond what each adds alone."""
        rows, columns = (self._table.paired_widths(self._groups[name]) for name in pair)
        added = np.zeros((len(rows) + 1, len(columns) + 1))
        for place, widths in zip(np.ndindex(len(rows), len(columns)), product(rows, columns), strict=True):
            both = dict(zip(pair, widths, strict=True))
            alone = sum(times[_key({name: width})] for name, width in both.items())
            added[place[0] + 1, place[1] + 1] = times[_key(both)] - alone + self._least
        first, second = (self._narrowest[name] for name in pair)
        return _Grid(np.array([first, *rows]), np.array([second, *columns]), added)


class _Grid(NamedTuple):
    """Values at pairs of widths.

    Attributes:
        rows: ascending.
        columns: ascending.
        values: shape (rows, columns).
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]

    def at(self, first: int, second: int) -> float:
        """The value at two widths, linear in each."""
        along = [float(np.interp(second, self.columns, row)) for row in self.values]
        return float(np.interp(first, self.rows, along))


def _exponent(least: float, checked: Sequence[tuple[float, float]]) -> float:
    """Of the sum over the least time, so that it is nearest to what was measured.

    Caches hold all of a narrow network but not of a wide one, which takes somewhat more than the sum.
    """
    sums, measured = (np.log(np.array(values) / least) for values in np.reshape(checked, (-1, 2)).T)
    return float(sums @ measured / (sums @ sums)) if sums.any() else 1.0


def _key(widths: Widths) -> frozenset[tuple[str, int]]:
    return frozenset(widths.items())


def read_latency_table(path: Path) -> LatencyTable:
    """The table in a file.

    Raises:
        LatencyError: there is none, or not a valid one.
    """
    try:
        return LatencyTable.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LatencyError(
            f"{path} cannot be read: {error.strerror}; `trimrt measure-layers` writes a latency table"
        ) from None
    except (UnicodeDecodeError, ValidationError) as error:
        reason = faults(error) if isinstance(error, ValidationError) else error
        raise LatencyError(f"{path} is not a valid latency table: {reason}") from error
