"""TrimRT beside other model servers, and beside the limit: `python -m benchmarks.peers`.

Every server answers the same photographs with the same INT8 network. They run one at a time, TrimRT
between any two of them, so that each is compared with the TrimRT of the same minutes. A server is
measured only after its answers proved right.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.answers import Labels, expected_labels
from benchmarks.contenders import BUILD, PEERS, REPOSITORY, TRIMRT, Contender, Form
from benchmarks.engine import INT8, prepare
from benchmarks.limit import Limit
from benchmarks.measurements import (
    LARGE,
    LARGE_CONNECTIONS,
    SMALL,
    Measurement,
    Results,
    Run,
    now,
    this_machine,
)
from benchmarks.photos import photographs, store
from benchmarks.processes import exit_on_sigterm
from benchmarks.report import write_report
from benchmarks.serving import Serving, serving

_WARM_UP_SECONDS: Final = 2


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


@dataclass
class Benchmark:
    """One run of the benchmark.

    Attributes:
        engines: folder from `benchmarks.engine.prepare`.
        kinds: photographs to load servers with.
        seconds: length of each load.
    """

    engines: Path
    kinds: Sequence[Photographs]
    seconds: float
    progress: Progress
    task: TaskID
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(started_at=now(), machine=this_machine(), seconds=self.seconds)

    def measure(self, contender: Contender, form: Form) -> None:
        """Start the contender, check its answers, load it, end it.

        Raises:
            click.ClickException: it does not start, or answers wrongly.
        """
        self._say(f"{contender.title} ({form}): starting")
        first = self.kinds[0].files[0].read_bytes()
        with serving(contender, form, self.engines, first) as server:
            self._check(server, form)
            idle = server.tree.memory_bytes()
            measurements = list(self._loads(server, form))
            loaded = server.tree.memory_bytes()
        self.results.runs.append(
            Run(
                name=contender.name,
                title=contender.title,
                form=form,
                start_seconds=server.start_seconds,
                idle_mb=idle / 1e6,
                loaded_mb=loaded / 1e6,
                installed_mb=contender.installed_bytes() / 1e6,
                measurements=measurements,
            )
        )

    def measure_limit(self) -> None:
        """What is possible without a server, in the environment that TrimRT serves from."""
        python = str(TRIMRT.environment / "bin" / "python")
        for kind in self.kinds:
            self._say(f"limit, {kind.name}")
            command = [
                python,
                "-m",
                "benchmarks.limit",
                str(self.engines / INT8),
                kind.name,
                str(self.seconds),
            ]
            result = subprocess.run(
                [*command, *map(str, kind.files)], cwd=REPOSITORY, capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise click.ClickException(f"benchmarks.limit failed:\n{result.stderr.strip()}")
            self.results.runs.append(Limit.model_validate_json(result.stdout.splitlines()[-1]))
            self.progress.advance(self.task)

    def _check(self, server: Serving, form: Form) -> None:
        for kind in self.kinds:
            for file, expected in zip(kind.files, kind.labels[form], strict=True):
                answer = server.ask(file.read_bytes())
                if answer != expected:
                    raise click.ClickException(
                        f"wrong labels for {file.name}: {', '.join(answer)} instead of {', '.join(expected)}"
                    )

    def _loads(self, server: Serving, form: Form) -> Iterator[Measurement]:
        for kind in self.kinds:
            for connections in kind.connections:
                self._say(f"{server.contender.title} ({form}): {kind.name}, {connections} connections")
                server.load(kind.files, connections, min(_WARM_UP_SECONDS, self.seconds))
                load, cpu_ms = server.load(kind.files, connections, self.seconds)
                yield Measurement(photograph=kind.name, connections=connections, load=load, cpu_ms=cpu_ms)
                self.progress.advance(self.task)

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


def schedule(contenders: Sequence[tuple[Contender, Form]]) -> list[tuple[Contender, Form]]:
    """`contenders` in their order, with TrimRT before, between and after them."""
    ours: tuple[Contender, Form] = (TRIMRT, "trimrt")
    return [ours, *(turn for contender in contenders for turn in (contender, ours))]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
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
@click.option("--seconds", default=8.0, show_default=True, help="Length of each load.")
@click.option("--connections", default="1,8,32", show_default=True, help="Connections, with commas.")
@click.option(
    "--large/--no-large", default=True, show_default=True, help="Also load with 12-megapixel JPEGs."
)
@click.option("--limit/--no-limit", default=True, show_default=True, help="Also measure without a server.")
@click.option(
    "--output",
    default=BUILD / "results",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="build/benchmarks/results",
    help="Folder for results.json, the table and the plot.",
)
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
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
        turns = schedule(
            [(peer, form) for peer in peers for form in peer.forms if not forms or form in forms]
        )
        loads = len(turns) * sum(len(kind.connections) for kind in kinds) + limit * len(kinds)
        progress.update(task, total=loads)
        benchmark = Benchmark(engines, kinds, seconds, progress, task)
        for index, (contender, form) in enumerate(turns):
            try:
                benchmark.measure(contender, form)
            except click.ClickException as error:
                if contender is TRIMRT:
                    raise
                benchmark.results.failures.append(error.message)
            if limit and index == len(turns) // 2:
                benchmark.measure_limit()
    write_report(benchmark.results, output, console)
    if benchmark.results.failures:
        raise click.ClickException("not every server was measured")


if __name__ == "__main__":
    main()
