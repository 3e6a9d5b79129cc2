"""Makes a latency table: narrows a graph in many ways, compiles each, and times them in turns.

All networks are narrow but for one group of channels, or two that meet in a layer. So each compiles and runs
in little time, and still has what whole networks have: fused layers, tensors laid out for the next layer.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from builder.compile.narrowing.channels import NarrowableGraph
from builder.compile.packages import trial
from builder.compile.targets.base import CompileError, Target
from builder.kit import Graph, Report, Student
from models.cores import cores
from models.latency import Group, LatencyError, LatencyTable, Timed, Widths
from runtime.jetson import power
from runtime.manifest import BatchSizes, Manifest
from runtime.timing import TimedSlots

_BLOCKS: Final = (8, 16)  # channels that kernels may compute at a time; what is neither is 32
_WIDTH: Final = 32  # a multiple of all blocks, from which one step of each is tried
_WHOLE_STEP: Final = 0.75  # share of the cost of two steps: if one step costs as much, it is no whole block
_BLOCK_TURNS: Final = 3
_AT_ONCE: Final = 8  # networks that take turns, all in memory
_ROUNDS: Final = 12
_RUNS: Final = 2  # of each network in a round, after one that warms the caches
_TURN_S: Final = 0.002  # of each network in a round, at least


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        student: the network.
        graph: what is in `path`.
        path: the ONNX file.
        target: the compiler; the engines are run here.
        batch: images in a batch.
    """

    student: Student
    graph: Graph
    path: Path
    target: Target
    batch: int


def measure_latencies(
    subject: Subject,
    begun: LatencyTable | None,
    save: Callable[[LatencyTable], None],
    report: Report,
    progress: Callable[[float], None] = lambda _share: None,
) -> LatencyTable:
    """Time narrowed networks until the table is complete.

    Args:
        subject: what, on what, how.
        begun: a table of the same graph and machine, to be continued.
        save: called with the table whenever it has grown.
        report: takes lines of progress.
        progress: takes the share that is done.

    Raises:
        CompileError: engines cannot be run here, or the compiler refused a graph.
        EngineError: an engine does not run.
        LatencyError: no channels of the graph can be narrowed, or `begun` is of something else.
    """
    if missing := subject.target.missing_device():
        raise CompileError(f"latencies are measured by running engines: {missing}")
    bench = _Bench(subject)
    if not bench.graph.groups:
        raise LatencyError(
            f"no channels of {subject.student.name} can be narrowed: only those of convolutions and matrix "
            "products can, between which stand elementwise operations, pooling and sums"
        )
    report("finding out how many channels the kernels compute at a time")
    table = bench.begin()
    if begun is not None:
        if not _same(begun, table):
            raise LatencyError(
                "the latency table is of another network, machine, precision or batch; write to another file"
            )
        table = begun
    while missing_networks := table.missing():
        for part in _parts(missing_networks):
            progress(table.progress)
            times = bench.time([_whole(table, widths) for widths in part])
            table = table.with_times(zip(part, times, strict=True))
            save(table)
    return table


def time_like(table: LatencyTable, subject: Subject) -> float | None:
    """The least milliseconds of a batch of the subject, timed as the table's networks were.

    Returns:
        None: the table is of another machine.

    Raises:
        CompileError: the compiler refused the graph.
        EngineError: the engine does not run.
    """
    if subject.target.missing_device():
        return None
    bench = _Bench(subject)
    timed = Timed(widths={}, times_ms=bench.time([{}]))
    where = bench.where()
    if where != {name: getattr(table, name) for name in where}:
        return None
    while not timed.settled:
        timed = Timed(widths={}, times_ms=[*timed.times_ms, *bench.time([{}])])
    return timed.ms


class _Bench:
    """Compiles and times networks of the subject's graph."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._manifest: Manifest | None = None
        self.graph = NarrowableGraph(subject.path.read_bytes())

    def begin(self) -> LatencyTable:
        """A table without times."""
        block = self._block()
        subject, manifest = self._subject, self._manifest
        assert manifest is not None, "networks were timed"
        return LatencyTable(
            created_at=datetime.now(timezone.utc),
            trimrt_version=version("trimrt"),
            network=subject.student.name,
            structure=self.graph.structure,
            macs=subject.student.macs,
            backend_version=manifest.backend_version,
            precision=subject.graph.precision,
            batch=subject.batch,
            **self.where(),
            block=block,
            groups=[
                Group(name=group.name, channels=group.channels, layers=group.layers)
                for group in self.graph.groups
            ],
            pairs=self.graph.pairs,
            timed=[],
        )

    def where(self) -> dict[str, Any]:
        """The machine, as tables describe it, once networks were timed."""
        assert self._manifest is not None, "networks were timed"
        mode = power()
        return {
            "backend": self._manifest.backend,
            "machine": self._manifest.compatibility.machine,
            "cores": cores(),
            "power": None if mode is None else str(mode),
        }

    def time(self, networks: Sequence[Widths]) -> list[float]:
        """The least milliseconds of a batch of each, timed in turns."""
        with ExitStack() as stack:
            slots = [stack.enter_context(closing(self._open(widths, stack))) for widths in networks]
            least = [math.inf] * len(slots)
            for _ in range(_ROUNDS):
                for place, slot in enumerate(slots):
                    longer = _RUNS * least[place] if least[place] < math.inf else 0
                    (times,) = slot.run(self._subject.batch, max(_TURN_S, longer), alone=True)
                    least[place] = min(least[place], *(times[1:] or times))  # the first warms the caches
        return [1000 * seconds for seconds in least]

    def _open(self, widths: Widths, stack: ExitStack) -> TimedSlots:
        subject = self._subject
        model = self.graph.narrowed(widths)
        path = Path(stack.enter_context(TemporaryDirectory(prefix="trimrt-")), subject.path.name)
        path.write_bytes(model)
        graph = subject.graph.model_copy(update={"sha256": hashlib.sha256(model).hexdigest()})
        batch = BatchSizes(min=subject.batch, opt=subject.batch, max=subject.batch)
        engine = stack.enter_context(
            trial(subject.student, subject.target, graph, path, batch, lambda _text: None)
        )
        self._manifest = engine.manifest
        return TimedSlots(engine, 1)

    def _block(self) -> int:
        """Channels that the kernels compute at a time: fewer cost as much."""
        widths = [_WIDTH, *(_WIDTH + block for block in _BLOCKS), 2 * _WIDTH]
        networks = [
            {group.name: min(group.channels, width) for group in self.graph.groups} for width in widths
        ]
        least = [math.inf] * len(networks)
        for _ in range(_BLOCK_TURNS):
            least = [min(pair) for pair in zip(least, self.time(networks), strict=True)]
        start, *added = least
        for block, (one, two) in zip(_BLOCKS, pairwise(added), strict=True):
            if one - start < _WHOLE_STEP * (two - start):
                return block
        return _WIDTH


def _same(one: LatencyTable, other: LatencyTable) -> bool:
    """Whether times of one table belong to the other."""
    changing = {"created_at", "trimrt_version", "network", "block", "timed"}
    return one.model_dump(exclude=changing) == other.model_dump(exclude=changing)


def _whole(table: LatencyTable, widths: Widths) -> dict[str, int]:
    """The width of every group."""
    return {group.name: widths.get(group.name, table.narrowest(group)) for group in table.groups}


def _parts(networks: Sequence[dict[str, int]]) -> Iterator[Sequence[dict[str, int]]]:
    """Those that take turns with each other, in an order of their own each time."""
    drawn = random.sample(networks, len(networks))
    for start in range(0, len(drawn), _AT_ONCE):
        yield drawn[start : start + _AT_ONCE]
