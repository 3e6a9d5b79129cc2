"""TrimRT beside other model servers, and beside the limit: `python -m benchmarks.peers`.

Every server answers the same photographs with the same INT8 network. Each runs side by side with a TrimRT
of its own and is loaded in turns with it; while one is at work, the other's processes are stopped. A
server is measured only after its answers proved right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import click
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.answers import Labels, expected_labels
from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD, PEERS, REPOSITORY, TRIMRT, Contender, Form
from benchmarks.engine import INT8, prepare, usable
from benchmarks.load import Round
from benchmarks.measurements import (
    LARGE,
    LARGE_CONNECTIONS,
    SMALL,
    Comparison,
    Limit,
    Measurement,
    Results,
    Run,
    this_machine,
)
from benchmarks.photos import photographs, store
from benchmarks.processes import exit_on_sigterm
from benchmarks.report import markdown, plot, write_report
from benchmarks.scaled_decoding import agreeing_labels
from benchmarks.serving import ServerError, Serving, serving
from benchmarks.stages import serve_nothing
from benchmarks.turns import take_turns
from benchmarks.unserved import Unserved, unserved
from models.datasets import open_dataset
from trimrt.options import HELP

_FIRST_WARM_UP: Final = 2.0
_WARM_UP: Final = 1.0
_TRAINED: Final = REPOSITORY / "engines" / "digits-resnet18-int8-openvino"  # of `make demo`
_DIGITS: Final = 300


@dataclass(frozen=True)
class Photographs:
    """One kind of photograph, with what a right answer to each file is.

    Attributes:
        name: as in tables.
        files: where they are, for `wrk`.
        connections: how many to load servers with.
        labels: of each file, in each form.
    """

    name: str
    files: list[Path]
    connections: Sequence[int]
    labels: Mapping[Form, list[Labels]]


class Side(Protocol):
    """What is loaded in turns with something else."""

    def turn(self, photographs: Photographs, connections: int, seconds: float) -> Round:
        """Load it for so many seconds."""


@dataclass
class Contestant:
    """A server that is stopped but for its turns.

    Attributes:
        server: what it is.
        idle_bytes: its memory before the first load.
    """

    server: Serving
    idle_bytes: int

    def turn(self, photographs: Photographs, connections: int, seconds: float) -> Round:
        """Load it for so many seconds."""
        with self.server.awake():
            return self.server.round(photographs.files, connections, seconds)

    def run(self, measurements: list[Measurement]) -> Run:
        """What was measured of it, once nothing more will be."""
        contender = self.server.contender
        return Run(
            name=contender.name,
            title=contender.title,
            form=self.server.form,
            start_seconds=self.server.start_seconds,
            idle_mb=self.idle_bytes / 1e6,
            loaded_mb=self.server.tree.memory_bytes() / 1e6,
            installed_mb=contender.installed_bytes() / 1e6,
            measurements=measurements,
        )


@dataclass
class Unhindered:
    """The limit: a loop for each kind of photograph, by its name."""

    loops: Mapping[str, Unserved]

    def turn(self, photographs: Photographs, connections: int, seconds: float) -> Round:
        """Let it work as is best for one image after the other, or for many at once."""
        what: Final = "latency" if connections == 1 else "throughput"
        return self.loops[photographs.name].round(what, seconds)


@dataclass
class Benchmark:
    """One run of the benchmark.

    Attributes:
        engines: folder from `benchmarks.engine.prepare`.
        kinds: photographs to load servers with.
        seconds: length of each load, in all its rounds.
    """

    engines: Path
    kinds: Sequence[Photographs]
    seconds: float
    progress: Progress
    task: TaskID
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(
            started_at=datetime.now(timezone.utc), machine=this_machine(), seconds=self.seconds
        )

    def compare(self, contender: Contender, form: Form) -> None:
        """Load a contender and TrimRT in turns.

        Raises:
            ServerError: one of them does not start, answers wrongly, or failed.
        """
        title = f"{contender.title} ({form})"
        with self._started(TRIMRT, "trimrt") as ours:
            with self._started(contender, form) as theirs:
                mine, others = self._loads(title, ours, theirs)
                other = theirs.run(others)
            self.results.comparisons.append(Comparison(other=other, trimrt=ours.run(mine)))

    def compare_limit(self) -> None:
        """The same with what is possible without a server, in the environment that TrimRT serves from.

        Raises:
            click.ClickException: TrimRT or the limit's process failed.
        """
        with ExitStack() as stack:
            loops = {}
            for kind in self.kinds:
                self._say(f"limit, {kind.name}: best settings")
                python = TRIMRT.environment / "bin" / "python"
                log = BUILD / f"limit-{kind.name.replace(' ', '')}.log"
                loops[kind.name] = stack.enter_context(unserved(python, self.engines / INT8, kind.files, log))
            ours = stack.enter_context(self._started(TRIMRT, "trimrt"))
            mine, others = self._loads("limit", ours, Unhindered(loops))
            settings = {name: loop.settings for name, loop in loops.items()}
            limit = Limit(measurements=others, settings=settings)
            self.results.comparisons.append(Comparison(other=limit, trimrt=ours.run(mine)))

    @contextmanager
    def _started(self, contender: Contender, form: Form) -> Iterator[Contestant]:
        """The contender, its answers checked, and stopped."""
        self._say(f"{contender.title} ({form}): starting")
        first = self.kinds[0].files[0].read_bytes()
        with serving(contender, form, self.engines, first) as server:
            for kind in self.kinds:
                for file, expected in zip(kind.files, kind.labels[form], strict=True):
                    server.check(file, expected)
            contestant = Contestant(server, server.tree.memory_bytes())
            server.tree.pause()
            yield contestant

    def _loads(self, title: str, ours: Side, theirs: Side) -> tuple[list[Measurement], list[Measurement]]:
        """Every load on both."""
        mine: list[Measurement] = []
        others: list[Measurement] = []
        for kind in self.kinds:
            for connections in kind.connections:
                self._say(f"{title}: {kind.name}, {connections} connections")
                our_turn = partial(ours.turn, kind, connections)
                their_turn = partial(theirs.turn, kind, connections)
                warm_up = _WARM_UP if mine else _FIRST_WARM_UP
                rounds = take_turns(our_turn, their_turn, self.seconds, warm_up)
                for done, found in zip(rounds, (mine, others), strict=True):
                    found.append(Measurement.of(kind.name, connections, done))
                self.progress.advance(self.task)
        return mine, others

    def _say(self, text: str) -> None:
        self.progress.update(self.task, description=text)


def store_photographs(
    name: str, files: Sequence[bytes], connections: Sequence[int], engines: Path
) -> Photographs:
    """Write `files` where `wrk` finds them, and compute the right answers."""
    paths = store(name, files, BUILD / "photographs")
    labels: dict[Form, list[Labels]] = {
        form: expected_labels(engines, form, files) for form in ("usual", "trimrt")
    }
    return Photographs(name, paths, connections, labels)


def measure_by_itself(results: Results, engines: Path, files: Sequence[Path], console: Console) -> None:
    """What the server costs with a network that costs nothing."""
    console.print("TrimRT with a network that costs nothing", highlight=False)
    whole, alone = serve_nothing(engines, files, results.seconds)
    results.server_cpu_ms = whole - alone


def measure_agreement(results: Results, console: Console) -> None:
    """Labels of large photographs, by the demonstration's trained engine if it is there and runs here."""
    if usable(_TRAINED):
        console.print(f"labels after scaled decoding, by {_TRAINED.name}", highlight=False)
        paths = open_dataset("digits").test.paths[:_DIGITS]
        results.agreement = agreeing_labels(_TRAINED, paths, megapixels=12) / len(paths)


@click.command(context_settings=HELP)
@click.option(
    "--contender",
    "names",
    multiple=True,
    type=click.Choice([peer.name for peer in PEERS]),
    help="Only this server, beside TrimRT; may be repeated.",
)
@click.option(
    "--form", "forms", multiple=True, type=click.Choice(["usual", "trimrt"]), help="Only peers of this form."
)
@click.option("--seconds", default=8.0, help="Length of each load, in rounds.")
@click.option("--connections", default="1,8,32", help="Connections, with commas.")
@click.option("--large/--no-large", default=True, help="Also 12-megapixel JPEGs.")
@click.option("--limit/--no-limit", default=True, help="Also measure without a server.")
@output_option("results.json, the table and the plot")
def main(
    names: tuple[str, ...],
    forms: tuple[Form, ...],
    seconds: float,
    connections: str,
    large: bool,
    limit: bool,
    output: Path,
) -> None:
    """Measure TrimRT beside other model servers, and beside the limit."""
    exit_on_sigterm()
    console = Console()
    peers = [peer for peer in PEERS if not names or peer.name in names]
    with steps(console) as progress:
        task = progress.add_task("installing", total=None)
        for contender in (TRIMRT, *peers):
            progress.update(task, description=f"installing {contender.title}")
            contender.install()
        engines = prepare(
            BUILD / "engine", lambda line: progress.update(task, description=f"building the engine: {line}")
        )
        kinds = [
            store_photographs(
                SMALL, photographs(), [int(number) for number in connections.split(",")], engines
            )
        ]
        if large:
            kinds.append(store_photographs(LARGE, photographs(12), [LARGE_CONNECTIONS], engines))
        pairs = [(peer, form) for peer in peers for form in peer.forms if not forms or form in forms]
        loads = sum(len(kind.connections) for kind in kinds)
        progress.update(task, total=(len(pairs) + limit) * loads)
        benchmark = Benchmark(engines, kinds, seconds, progress, task)
        for index, (contender, form) in enumerate(pairs):
            if limit and index == len(pairs) // 2:
                benchmark.compare_limit()
            try:
                benchmark.compare(contender, form)
            except ServerError as error:
                if error.contender is TRIMRT:
                    raise
                benchmark.results.failures.append(error.message)
            done = index + 1 + (limit and index >= len(pairs) // 2)
            progress.update(task, completed=done * loads)
    try:
        if limit:
            measure_by_itself(benchmark.results, engines, kinds[0].files, console)
        if large:
            measure_agreement(benchmark.results, console)
    finally:
        results = benchmark.results
        write_report(results, markdown(results), output / "results.json", console)
        plot(results, output / "results.svg")
    if benchmark.results.failures:
        raise click.ClickException("not every server was measured")


if __name__ == "__main__":
    main()
