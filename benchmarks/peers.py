"""TrimRT beside other model servers, and beside the limit: `python -m benchmarks.peers`.

Every server answers the same images with the same INT8 network: a ResNet18 for photographs, or with
`--network digits` one that takes a tenth of a millisecond, so that what servers cost shows. Each runs side by
side with a TrimRT of its own and is loaded in turns with it; while one is at work, the other's processes are
stopped. A server is measured only after its answers proved right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol

import click
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.answers import Labels, expected_labels
from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD, PEERS, REPOSITORY, TRIMRT, WAYS, Contender, Form
from benchmarks.engine import INT8, prepare, prepare_digits, usable
from benchmarks.load import Round
from benchmarks.measurements import (
    DIGIT,
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
from models.cores import cores
from models.datasets import open_dataset
from trimrt.options import HELP

_FIRST_WARM_UP: Final = 2.0
_WARM_UP: Final = 1.0
_TRAINED: Final = REPOSITORY / "engines" / "digits-resnet18-int8-openvino"  # of `make demo`
_DIGITS: Final = 300
_POSTED_DIGITS: Final = 10


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
        package: the engine package.
        trimrt: TrimRT as it is compared.
        kinds: images to load servers with.
        seconds: length of each load, in all its rounds.
    """

    package: Path
    trimrt: Contender
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
        with self._started(self.trimrt, "trimrt") as ours:
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
                loops[kind.name] = stack.enter_context(unserved(python, self.package, kind.files, log))
            ours = stack.enter_context(self._started(self.trimrt, "trimrt"))
            mine, others = self._loads("limit", ours, Unhindered(loops))
            settings = {name: loop.settings for name, loop in loops.items()}
            limit = Limit(measurements=others, settings=settings)
            self.results.comparisons.append(Comparison(other=limit, trimrt=ours.run(mine)))

    @contextmanager
    def _started(self, contender: Contender, form: Form) -> Iterator[Contestant]:
        """The contender, its answers checked, and stopped."""
        self._say(f"{contender.title} ({form}): starting")
        first = self.kinds[0].files[0].read_bytes()
        with serving(contender, form, self.package, first) as server:
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


def store_images(
    name: str, files: Sequence[bytes], connections: Sequence[int], package: Path, forms: Sequence[Form]
) -> Photographs:
    """Write `files` where `wrk` finds them, and compute the right answers."""
    paths = store(name, files, BUILD / "photographs")
    labels: dict[Form, list[Labels]] = {form: expected_labels(package, form, files) for form in forms}
    return Photographs(name, paths, connections, labels)


def contenders(
    network: str, names: Sequence[str], forms: Sequence[Form], workers: Sequence[int]
) -> list[tuple[Contender, Form]]:
    """Who is compared with TrimRT, in which form.

    Args:
        network: `resnet18` or `digits`, which has no float graph and so no usual form.
        names: of peers and `WAYS`; none: all peers, and with `digits` the ways too.
        forms: of the peers; none: all.
        workers: numbers of processes, each of which makes every peer another one; none: its own set-up.
    """
    peers = [peer for peer in PEERS if not names or peer.name in names]
    if workers:
        peers = [peer.with_workers(number) for peer in peers for number in workers]
    pairs = [(peer, form) for peer in peers for form in peer.forms if not forms or form in forms]
    if network == "resnet18":
        return pairs
    ways = [
        replace(way, workers=way.workers or cores())
        for name, way in WAYS.items()
        if not names or name in names
    ]
    return [*((way, "trimrt") for way in ways), *(pair for pair in pairs if pair[1] == "trimrt")]


def resume(results: Results, path: Path) -> None:
    """Take over what an earlier run on this machine measured of other servers.

    Raises:
        click.ClickException: it was another machine.
    """
    if not path.is_file():
        return
    before = Results.model_validate_json(path.read_text(encoding="utf-8"))
    results.machine.check_same(before.machine, path)
    measured = {_key(comparison) for comparison in results.comparisons}
    kept = [comparison for comparison in before.comparisons if _key(comparison) not in measured]
    results.comparisons[:0] = kept
    results.server_cpu_ms = results.server_cpu_ms or before.server_cpu_ms
    results.agreement = results.agreement or before.agreement


def _key(comparison: Comparison) -> tuple[str, str] | None:
    other = comparison.other
    return (other.title, other.form) if isinstance(other, Run) else None


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


def _numbers(_context: click.Context, _option: click.Parameter, value: str | None) -> list[int]:
    return [int(number) for number in value.split(",")] if value else []


@click.command(context_settings=HELP)
@click.option(
    "--network",
    type=click.Choice(["resnet18", "digits"]),
    default="resnet18",
    help="Which network to serve; TrimRT serves digits in a process for each core.",
)
@click.option(
    "--contender",
    "names",
    multiple=True,
    type=click.Choice([*(peer.name for peer in PEERS), *WAYS]),
    help="Only this server beside TrimRT, or this other way of TrimRT's; may be repeated.",
)
@click.option("--no-contender", "nobody", is_flag=True, help="No server beside TrimRT: the limit alone.")
@click.option(
    "--workers",
    callback=_numbers,
    help="Processes of each peer, with commas: each number is a peer of its own. Its own set-up if left out.",
)
@click.option(
    "--form", "forms", multiple=True, type=click.Choice(["usual", "trimrt"]), help="Only peers of this form."
)
@click.option("--seconds", default=8.0, help="Length of each load, in rounds.")
@click.option("--connections", default="1,8,32", callback=_numbers, help="Connections, with commas.")
@click.option("--large/--no-large", default=True, help="Also 12-megapixel JPEGs.")
@click.option("--limit/--no-limit", default=True, help="Also measure without a server.")
@click.option("--add", is_flag=True, help="Keep what the written results have of servers not measured now.")
@output_option("results.json (digits.json), the table and the plot")
def main(
    network: Literal["resnet18", "digits"],
    names: tuple[str, ...],
    nobody: bool,
    workers: list[int],
    forms: tuple[Form, ...],
    seconds: float,
    connections: list[int],
    large: bool,
    limit: bool,
    add: bool,
    output: Path,
) -> None:
    """Measure TrimRT beside other model servers, and beside the limit."""
    exit_on_sigterm()
    console = Console()
    pairs = [] if nobody else contenders(network, names, forms, workers)
    with steps(console) as progress:
        task = progress.add_task("installing", total=None)
        for contender in (TRIMRT, *(pair[0] for pair in pairs)):
            progress.update(task, description=f"installing {contender.title}")
            contender.install()
        progress.update(task, description="building the engine")
        if network == "digits":
            package, trimrt = prepare_digits(BUILD / "engine"), replace(TRIMRT, workers=cores())
            digits = [path.read_bytes() for path in open_dataset("digits").test.paths[:_POSTED_DIGITS]]
            kinds = [store_images(DIGIT, digits, connections, package, ["trimrt"])]
        else:
            package, trimrt = prepare(BUILD / "engine", lambda _step: None) / INT8, TRIMRT
            both: list[Form] = ["usual", "trimrt"]
            kinds = [store_images(SMALL, photographs(), connections, package, both)]
            if large:
                kinds.append(store_images(LARGE, photographs(12), [LARGE_CONNECTIONS], package, both))
        loads = sum(len(kind.connections) for kind in kinds)
        progress.update(task, total=(len(pairs) + limit) * loads)
        benchmark = Benchmark(package, trimrt, kinds, seconds, progress, task)
        if limit and not pairs:
            benchmark.compare_limit()
        for index, (contender, form) in enumerate(pairs):
            if limit and index == len(pairs) // 2:
                benchmark.compare_limit()
            try:
                benchmark.compare(contender, form)
            except ServerError as error:
                if error.contender is trimrt:
                    raise
                benchmark.results.failures.append(error.message)
            done = index + 1 + (limit and index >= len(pairs) // 2)
            progress.update(task, completed=done * loads)
    results = benchmark.results
    path = output / ("digits.json" if network == "digits" else "results.json")
    try:
        if limit and network == "resnet18":
            measure_by_itself(results, package.parent, kinds[0].files, console)
        if large and network == "resnet18":
            measure_agreement(results, console)
    finally:
        if add:
            resume(results, path)
        write_report(results, markdown(results), path, console)
        plot(results, path.with_suffix(".svg"))
    if benchmark.results.failures:
        raise click.ClickException("not every server was measured")


if __name__ == "__main__":
    main()
