"""What TrimRT is to reach beside its peers and the limit, and whether a run shows it.

Every ratio is of TrimRT to what it took turns with, and "the best peer" is the one that TrimRT does worst
against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from benchmarks.measurements import LARGE, LARGE_CONNECTIONS, SMALL, Limit, Measurement, Results, Run

_START_SECONDS: Final = 2
_MEMORY_MB: Final = 300
_SERVER_CPU_MS: Final = 0.5
_AGREEMENT: Final = 0.99


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        what: of TrimRT's is measured.
        least: the bar, where more is better.
        most: the bar, where less is.
        measured: in this run.
        bound: what a server that costs nothing would have reached: the limit beside the peer.
    """

    what: str
    least: float | None
    most: float | None
    measured: float
    bound: float | None = None

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
    for count in (8, 32):
        ratio = _to_the_limit(results, SMALL, count)
        if ratio is not None:
            yield Goal(f"throughput at {count} connections to the limit's", 0.9, None, ratio)
    ratio = _to_the_limit(results, SMALL, 1, lambda measured: measured.load.p50)
    if ratio is not None:
        yield Goal("latency at 1 connection to decoding and inference alone", None, 1.2, ratio)


def _against_peers(
    results: Results, form: Literal["usual", "trimrt"], whom: str, *, throughput: float, p99: float
) -> Iterator[Goal]:
    def ratios(photograph: str, connections: int, of: Callable[[Measurement], float]) -> list[float]:
        found = [
            comparison.ratio(photograph, connections, of)
            for comparison in results.comparisons
            if isinstance(comparison.other, Run) and comparison.other.form == form
        ]
        return [ratio for ratio in found if ratio is not None]

    def bound(photograph: str, connections: int, ratio: float) -> float | None:
        to_limit = _to_the_limit(results, photograph, connections)
        return ratio / to_limit if to_limit else None

    for count in (8, 32):
        if found := ratios(SMALL, count, _throughput):
            worst = min(found)
            what = f"throughput at {count} connections to {whom}"
            yield Goal(what, throughput, None, worst, bound(SMALL, count, worst))
    if found := ratios(SMALL, 8, lambda measured: measured.load.p99):
        yield Goal(f"p99 at 8 connections to {whom}", None, p99, max(found))
    if form == "usual" and (found := ratios(LARGE, LARGE_CONNECTIONS, _throughput)):
        worst = min(found)
        what = f"throughput of {LARGE} JPEGs to {whom}"
        yield Goal(what, 4, None, worst, bound(LARGE, LARGE_CONNECTIONS, worst))


def _by_itself(results: Results) -> Iterator[Goal]:
    if ours := results.ours:
        starts = median(run.start_seconds for run in ours)
        yield Goal("seconds to the first answer", None, _START_SECONDS, starts)
        yield Goal("megabytes after all loads", None, _MEMORY_MB, median(run.loaded_mb for run in ours))
    if results.server_cpu_ms is not None:
        what = "processor ms of the server itself for one request"
        yield Goal(what, None, _SERVER_CPU_MS, results.server_cpu_ms)
    if results.agreement is not None:
        what = f"share of labels that scaled decoding of {LARGE} JPEGs leaves as they are"
        yield Goal(what, _AGREEMENT, None, results.agreement)


def _throughput(measured: Measurement) -> float:
    return measured.load.throughput


def _to_the_limit(
    results: Results, photograph: str, connections: int, of: Callable[[Measurement], float] = _throughput
) -> float | None:
    """TrimRT's figure over the limit's, if both were measured."""
    for comparison in results.comparisons:
        if isinstance(comparison.other, Limit):
            return comparison.ratio(photograph, connections, of)
    return None
