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

A network that takes a tenth of a millisecond shows the server instead: its goals are how far TrimRT is ahead
of peers that have our preprocessing and engine, and what a request takes beside decoding and inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.contenders import TRIMRT, WAYS
from benchmarks.measurements import (
    DIGIT,
    LARGE,
    SMALL,
    Comparison,
    Limit,
    Measurement,
    Results,
    Run,
)

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

# With the fast network.
_PEERS: Final = {8: 1.4, 32: 1.6}  # by connections
_PEERS_P99: Final = 0.7
_OF_A_CORE: Final = 0.8  # what each further process gains
_NO_LOSS: Final = 0.97
_OTHER_WAYS: Final = {"form": 0.95, "v2": 0.9}
_OWN_MS: Final = 0.35  # of latency, at one connection
_OWN_CPU_MS: Final = 0.25
_START_S: Final = 1.0
_BASE_MB: Final = 150
_WORKER_MB: Final = 100


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
    if results.photograph == DIGIT:
        return [*_beside_peers(results), *_beside_other_ways(results), *_own_cost(results)]
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


def _beside_peers(results: Results) -> Iterator[Goal]:
    """The fast network beside the fastest peer that has our preprocessing and engine."""
    peers = {
        it.other.title: it
        for it in results.comparisons
        if isinstance(it.other, Run) and it.other.name != TRIMRT.name and it.other.form == "trimrt"
    }
    for connections, least in _PEERS.items():
        load = (DIGIT, connections)
        gains = {
            title: gain
            for title, peer in peers.items()
            if (gain := peer.ratio(*load, _throughput)) is not None
        }
        if not gains:
            continue
        best = min(gains, key=gains.__getitem__)
        yield Goal(
            f"{connections} connections: throughput to the best peer's ({best})", least, None, gains[best]
        )
        p99 = peers[best].ratio(*load, lambda measured: measured.load.p99)
        if p99 is not None:
            yield Goal(f"{connections} connections: p99 to its", None, _PEERS_P99, p99)


def _beside_other_ways(results: Results) -> Iterator[Goal]:
    """The fast network beside one process, and in other forms beside raw `/predict`."""
    alone, cores = results.beside(WAYS["one-process"].title), results.machine.cores
    for connections in _PEERS:
        gain = alone and alone.ratio(DIGIT, connections, _throughput)
        if gain:
            name = f"{connections} connections: throughput to one process's"
            yield Goal(name, _OF_A_CORE * cores if cores > 1 else _NO_LOSS, None, gain)
        for way, least in _OTHER_WAYS.items():
            beside = results.beside(WAYS[way].title)
            raw = beside and beside.ratio(DIGIT, connections, _throughput)
            if raw:
                name = f"{connections} connections: throughput of {WAYS[way].title} to raw"
                yield Goal(name, least, None, 1 / raw)


def _own_cost(results: Results) -> Iterator[Goal]:
    """What the fast network's requests take beside decoding and inference, and what the server takes."""
    limits = (it for it in results.comparisons if isinstance(it.other, Limit))
    for it in limits:
        for mine in it.trimrt.measurements:
            alone = it.other.at(DIGIT, mine.connections)
            if alone is not None and mine.connections == 1:
                more = mine.load.p50 - alone.load.p50
                yield Goal("1 connection: ms of p50 beside decoding and inference", None, _OWN_MS, more)
            elif alone is not None and mine.connections == max(_PEERS):
                name = f"{mine.connections} connections: ms of processor time beside these"
                yield Goal(name, None, _OWN_CPU_MS, mine.cpu_ms - alone.cpu_ms)
    if results.ours:
        most = _BASE_MB + _WORKER_MB * results.machine.cores
        name = "megabytes after all loads, a process for each core"
        yield Goal(name, None, most, median(run.loaded_mb for run in results.ours))
    if (one := results.beside(WAYS["one-process"].title)) is not None and isinstance(one.other, Run):
        yield Goal("seconds until the first answer, one process", None, _START_S, one.other.start_seconds)


def _throughput(measured: Measurement) -> float:
    return measured.load.throughput
