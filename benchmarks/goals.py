"""What TrimRT is to reach beside its peers and the limit, and whether a run shows it.

Every ratio is to the TrimRT runs next to the other one, and "the best peer" is the one that TrimRT does
worst against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

from benchmarks.limit import Limit
from benchmarks.measurements import LARGE, LARGE_CONNECTIONS, SMALL, Measurement, Results, Run

_START_SECONDS: Final = 2
_MEMORY_MB: Final = 300


@dataclass(frozen=True)
class Goal:
    """One line of the table."""

    what: str
    least: float | None
    most: float | None
    measured: float

    @property
    def bar(self) -> str:
        """As text."""
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"

    @property
    def reached(self) -> bool:
        """Whether the measured value is on the right side of the bar."""
        if self.least is not None:
            return self.measured >= self.least
        return self.most is not None and self.measured <= self.most


def goals(results: Results) -> list[Goal]:
    """All goals that the run says something of."""
    return [
        *_against_the_limit(results),
        *_against_peers(results, "usual", "the best peer as its users write it", throughput=1.45, p99=0.7),
        *_against_peers(results, "trimrt", "the best peer given our preprocessing", throughput=1.15, p99=0.9),
        *_by_itself(results),
    ]


def _against_the_limit(results: Results) -> Iterator[Goal]:
    for index, limit in enumerate(results.runs):
        if not isinstance(limit, Limit) or limit.photograph != SMALL:
            continue
        for count in (8, 32):
            mine = _mine(results, index, SMALL, count, _throughput)
            if mine is not None:
                ratio = mine / limit.throughput
                yield Goal(f"throughput at {count} connections to the limit's", 0.9, None, ratio)
        mine = _mine(results, index, SMALL, 1, lambda measured: measured.load.p50)
        if mine is not None:
            ratio = mine / limit.latency_ms
            yield Goal("latency at 1 connection to decoding and inference alone", None, 1.2, ratio)


def _against_peers(
    results: Results, form: Literal["usual", "trimrt"], whom: str, *, throughput: float, p99: float
) -> Iterator[Goal]:
    for count in (8, 32):
        ratios = _ratios(results, form, SMALL, count, _throughput)
        if ratios:
            yield Goal(f"throughput at {count} connections to {whom}", throughput, None, min(ratios))
    ratios = _ratios(results, form, SMALL, 8, lambda measured: measured.load.p99)
    if ratios:
        yield Goal(f"p99 at 8 connections to {whom}", None, p99, max(ratios))
    ratios = _ratios(results, form, LARGE, LARGE_CONNECTIONS, _throughput)
    if ratios and form == "usual":
        yield Goal(f"throughput of {LARGE} JPEGs to {whom}", 4, None, min(ratios))


def _by_itself(results: Results) -> Iterator[Goal]:
    ours = [run for run in results.runs if isinstance(run, Run) and run.name == "trimrt"]
    if ours:
        yield Goal(
            "seconds to the first answer", None, _START_SECONDS, fmean(run.start_seconds for run in ours)
        )
        yield Goal("megabytes after all loads", None, _MEMORY_MB, fmean(run.loaded_mb for run in ours))


def _ratios(
    results: Results, form: str, photograph: str, connections: int, of: Callable[[Measurement], float]
) -> list[float]:
    """TrimRT's figure over each peer's."""
    ratios = []
    for index, run in enumerate(results.runs):
        if isinstance(run, Run) and run.name != "trimrt" and run.form == form:
            theirs, mine = run.at(photograph, connections), _mine(results, index, photograph, connections, of)
            if theirs is not None and mine is not None and of(theirs) > 0:
                ratios.append(mine / of(theirs))
    return ratios


def _mine(
    results: Results, index: int, photograph: str, connections: int, of: Callable[[Measurement], float]
) -> float | None:
    """The mean of TrimRT's figures next to the run at `index`."""
    found = [run.at(photograph, connections) for run in results.neighbours(index)]
    values = [of(measured) for measured in found if measured is not None]
    return fmean(values) if values else None


def _throughput(measured: Measurement) -> float:
    return measured.load.throughput
