"""What TrimRT is to reach, and whether a run shows it.

A goal is to mean the same on a slow and on a fast processor, so each compares two figures of one run:

- Throughput and latencies are held against the limit that took turns with TrimRT.
- No peer is to be faster than TrimRT. How far TrimRT can be ahead depends on the time that the network takes,
  so no bar says how far. TrimRT's gain over a peer, divided by the gain that a server would have that costs
  nothing (the limit over that peer), is no further goal: it is TrimRT's share of the limit again.
- No goal compares p99 with a peer's. The slower the network, the nearer are all throughputs, and then a
  server that answers each image by itself has a shorter p99 than one that answers batches.

Seconds until the first answer and the server's own milliseconds depend on the processor: the report has them,
without a goal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.measurements import LARGE, SMALL, Comparison, Limit, Measurement, Results, Run

# Bodies of megabytes have to be received, which the limit does not do.
_SHARES: Final = {SMALL: 0.9, LARGE: 0.85}
# An image that comes just after a batch has begun waits for the end of that batch, and of its own.
_P99: Final = 2
_LATENCY: Final = 1.2
_MEMORY_MB: Final = 300
_AGREEMENT: Final = 0.99

# With fewer connections a core, slots wait for their clients.
_CONNECTIONS_A_CORE: Final = 4
# Where even a server that costs nothing would hardly be ahead of the peer, chance decides who is.
_LEAD: Final = 1.05
# Each core has a slot of its own, which takes memory.
_MEMORY_CORES: Final = 2


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
    peers = [comparison for comparison in results.comparisons if isinstance(comparison.other, Run)]
    busy = _CONNECTIONS_A_CORE * results.machine.cores
    beside = (
        goal
        for comparison in results.comparisons
        if isinstance(comparison.other, Limit)
        for goal in _beside_the_limit(comparison, comparison.other, peers, busy)
    )
    return [*beside, *_by_itself(results)]


def _beside_the_limit(
    beside: Comparison, limit: Limit, peers: Sequence[Comparison], busy: int
) -> Iterator[Goal]:
    """The goals at one connection, and at `busy` connections or more."""
    alone = beside.ratio(SMALL, 1, lambda measured: measured.load.p50)
    if alone is not None:
        yield Goal("latency at 1 connection to decoding and inference alone", None, _LATENCY, alone)
    for mine in beside.trimrt.measurements:
        load = (mine.photograph, mine.connections)
        possible, share = limit.at(*load), beside.ratio(*load, _throughput)
        if mine.connections < busy or possible is None or not share:
            continue
        name = f"{mine.photograph}, {mine.connections} connections"
        yield Goal(f"{name}: throughput to the limit's", _SHARES[mine.photograph], None, share)
        ms = 1000 * mine.connections / possible.load.throughput
        yield Goal(
            f"{name}: p99 to the limit's time for {mine.connections} images", None, _P99, mine.load.p99 / ms
        )
        gains = [gain for peer in peers if (gain := peer.ratio(*load, _throughput)) is not None]
        if gains and min(gains) / share >= _LEAD:
            yield Goal(f"{name}: throughput to the best peer's", 1, None, min(gains), min(gains) / share)


def _by_itself(results: Results) -> Iterator[Goal]:
    if results.ours and results.machine.cores <= _MEMORY_CORES:
        memory = median(run.loaded_mb for run in results.ours)
        yield Goal("megabytes after all loads", None, _MEMORY_MB, memory)
    if results.agreement is not None:
        what = f"share of labels that scaled decoding of {LARGE} JPEGs leaves as they are"
        yield Goal(what, _AGREEMENT, None, results.agreement)


def _throughput(measured: Measurement) -> float:
    return measured.load.throughput
