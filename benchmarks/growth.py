"""How TrimRT grows: `python -m benchmarks.growth`.

With image size, connections and batch; with the number of classes, of engines and of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD, TRIMRT
from benchmarks.engine import FP32, INT8, LABELS, build, prepare, prepare_digits, usable
from benchmarks.load import Load
from benchmarks.measurements import Machine, this_machine
from benchmarks.photos import photographs, store
from benchmarks.processes import exit_on_sigterm
from benchmarks.report import markdown_table, write_report
from benchmarks.serving import Serving, serving
from models.cores import cores
from models.datasets import open_dataset
from runtime.loading import load_engine
from runtime.manifest import MANIFEST_NAME, read_manifest
from trimrt.bench.timing import Timing, time_engines
from trimrt.options import HELP, one_or_more_of

MEGAPIXELS: Final = (0.1, 0.27, 1.0, 3.0, 6.0, 12.0, 24.0)
CONNECTIONS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES: Final = (1, 2, 4, 8, 16, 32)
ENGINES: Final = (1, 2, 4, 8, 16)

_SIZE_CONNECTIONS: Final = 8
_DIGIT_CONNECTIONS: Final = 32
_WARM_UP: Final = 2.0


class Point(BaseModel):
    """One load."""

    at: float
    load: Load
    cpu_ms: float
    memory_mb: float | None = Field(default=None, description="of all processes, after the load")
    ready_s: float | None = Field(default=None, description="from the start to the first answer")


class Growth(BaseModel):
    """The curves."""

    machine: Machine
    seconds: float
    sizes: list[Point] = []
    connections: list[Point] = []
    batches: dict[str, list[Timing]] = {}
    labels: list[Point] = []
    engines: list[Point] = []
    processes: list[Point] = []


CURVES: Final = tuple(name for name in Growth.model_fields if name not in ("machine", "seconds"))

# Curves of loads: how the points are called, and what was loaded.
_LOADS: Final = {
    "sizes": ("megapixels", f"JPEGs of so many megapixels, {_SIZE_CONNECTIONS} connections:"),
    "connections": ("connections", "640x427 JPEGs, so many connections:"),
    "labels": (
        "classes",
        f"A network that costs nothing, so many classes, PNGs of digits, {_DIGIT_CONNECTIONS} connections:",
    ),
    "engines": (
        "engines",
        f"So many copies of the digits' engine, asked in turn, {_DIGIT_CONNECTIONS} connections:",
    ),
    "processes": ("processes", f"The digits' engine in so many processes, {_DIGIT_CONNECTIONS} connections:"),
}


def markdown(growth: Growth) -> str:
    """The curves as tables."""
    lines = [f"{growth.machine}; {growth.seconds:g} s a load."]
    for name in CURVES:
        curve = getattr(growth, name)
        if curve and name == "batches":
            lines += ["", "Engines by themselves, all cores, batches of so many images:", ""]
            lines += _batches(growth)
        elif curve:
            title, what = _LOADS[name]
            lines += ["", what, "", *_loads(title, curve)]
    return "\n".join(lines) + "\n"


def _batches(growth: Growth) -> list[str]:
    head = ["batch", *(f"{name}: {what}" for name in growth.batches for what in ("images/s", "p50 ms"))]
    rows = []
    for timings in zip(*growth.batches.values(), strict=True):
        row = [str(timings[0].batch)]
        for timing in timings:
            row += [f"{timing.throughput:.0f}", f"{timing.percentiles_ms['p50']:.2f}"]
        rows.append(row)
    return markdown_table(head, rows, left=0)


def _loads(title: str, points: Sequence[Point]) -> list[str]:
    head = [title, "images/s", "p50 ms", "p99 ms", "CPU ms an image", "refused", "failed"]
    rows = [
        [
            f"{point.at:g}",
            f"{point.load.throughput:.1f}",
            f"{point.load.p50:.1f}",
            f"{point.load.p99:.1f}",
            f"{point.cpu_ms:.2f}",
            str(point.load.refused),
            str(point.load.failed),
        ]
        for point in points
    ]
    if points[0].memory_mb is not None:
        head += ["memory MB", "ready after s"]
        rows = [
            [*row, f"{point.memory_mb:.0f}", f"{point.ready_s:.2f}"]
            for row, point in zip(rows, points, strict=True)
        ]
    return markdown_table(head, rows, left=0)


def plot(growth: Growth, path: Path) -> None:
    """The curves as a figure."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    curves = [name for name in CURVES if getattr(growth, name)]
    rows = -(-len(curves) // 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(12, 3.6 * rows), squeeze=False)
    for axis in grid.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, name in zip(grid.flat, curves, strict=False):
        if name == "batches":
            lines = {
                engine: [(timing.batch, timing.throughput) for timing in timings]
                for engine, timings in growth.batches.items()
            }
        else:
            lines = {"": [(point.at, point.load.throughput) for point in getattr(growth, name)]}
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set_xlabel(_LOADS[name][0] if name in _LOADS else "batch, engine by itself")
        axis.set_ylabel("images a second")
        axis.set_xscale("log", base=10 if name in ("sizes", "labels") else 2)
        axis.set_ylim(bottom=0)
        ticks = [at for at, _ in next(iter(lines.values()))]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
        if name == "batches":
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


@dataclass(frozen=True)
class Measuring:
    """Measures one curve after the other.

    Attributes:
        growth: takes the points.
    """

    growth: Growth
    progress: Progress
    task: TaskID

    def measure(self, name: str) -> None:
        """One of `CURVES`."""
        self.progress.update(self.task, description=name)
        getattr(self, f"_{name}")()

    def _sizes(self) -> None:
        with self._photographs() as (server, _):
            self.growth.sizes = []
            for megapixels in MEGAPIXELS:
                files = store(f"{megapixels:g}MP", photographs(megapixels), BUILD / "photographs")
                self.growth.sizes.append(self._point(server, megapixels, files, _SIZE_CONNECTIONS))

    def _connections(self) -> None:
        with self._photographs() as (server, files):
            self.growth.connections = []
            for connections in CONNECTIONS:
                self.growth.connections.append(self._point(server, connections, files, connections))

    def _batches(self) -> None:
        folder = prepare(BUILD / "engine", click.echo)
        with closing(load_engine(folder / FP32)) as fp32, closing(load_engine(folder / INT8)) as int8:
            self.growth.batches = {"FP32": [], "INT8": []}
            for batch in BATCHES:
                timings = time_engines(
                    [fp32, int8],
                    batch,
                    seconds=self.growth.seconds / 2,
                    warm_up=0.5,
                    progress=lambda: None,
                )
                for curve, timing in zip(self.growth.batches.values(), timings, strict=True):
                    curve.append(timing)
                self.progress.advance(self.task)

    def _labels(self) -> None:
        self.growth.labels = [
            self._start(classes, prepare_colour(classes), {}, [TRIMRT.path]) for classes in LABELS
        ]

    def _engines(self) -> None:
        self.growth.engines = []
        for number in ENGINES:
            packages = copies(prepare_digits(BUILD / "engine"), number, BUILD / "copies")
            settings = {"TRIMRT_ENGINE": ",".join(map(str, packages))}
            paths = [f"{TRIMRT.path}&engine={package.name}" for package in packages]
            self.growth.engines.append(self._start(number, packages[0], settings, paths))

    def _processes(self) -> None:
        package = prepare_digits(BUILD / "engine")
        self.growth.processes = [
            self._start(number, package, {"TRIMRT_WORKERS": str(number)}, [TRIMRT.path])
            for number in process_counts(cores())
        ]

    @contextmanager
    def _photographs(self) -> Iterator[tuple[Serving, list[Path]]]:
        """A warm server of the ResNet18, and small photographs."""
        package = prepare(BUILD / "engine", click.echo) / INT8
        files = store("640x427", photographs(), BUILD / "photographs")
        # As many as the most connections: the curve is to show how it queues, not how it refuses.
        settings = {"TRIMRT_QUEUE_LIMIT": str(2 * max(CONNECTIONS))}
        with serving(TRIMRT, "trimrt", package, files[0].read_bytes(), settings) as server:
            server.load(files, _SIZE_CONNECTIONS, _WARM_UP)
            yield server, files

    def _start(self, at: float, package: Path, settings: Mapping[str, str], paths: Sequence[str]) -> Point:
        """A load of digits on a server of its own."""
        files = open_dataset("digits").test.paths[:1]
        with serving(TRIMRT, "trimrt", package, files[0].read_bytes(), settings) as server:
            server.load(files, _DIGIT_CONNECTIONS, _WARM_UP, paths)
            point = self._point(server, at, files, _DIGIT_CONNECTIONS, paths)
            memory = server.tree.memory_bytes() / 1e6
            return point.model_copy(update={"memory_mb": memory, "ready_s": server.start_seconds})

    def _point(
        self, server: Serving, at: float, files: Sequence[Path], connections: int, paths: Sequence[str] = ()
    ) -> Point:
        load, cpu_ms = server.load(files, connections, self.growth.seconds, paths)
        self.progress.advance(self.task)
        return Point(at=at, load=load, cpu_ms=cpu_ms)


def resumed(growth: Growth, path: Path) -> Growth:
    """What an earlier run wrote to `path`, for more curves; `growth` if there was none.

    Raises:
        click.ClickException: it was another machine, or its loads were of another length.
    """
    if not path.is_file():
        return growth
    before = Growth.model_validate_json(path.read_text(encoding="utf-8"))
    growth.machine.check_same(before.machine, path)
    if before.seconds != growth.seconds:
        raise click.ClickException(f"the loads in {path} took {before.seconds:g} s, not {growth.seconds:g} s")
    return before


def prepare_colour(classes: int) -> Path:
    """The package of a network that costs nothing, built unless it is there and runs here."""
    folder = BUILD / "engine"
    package = folder / f"colour-{classes}-fp32-openvino"
    if not usable(package):
        build([(f"colour-{classes}", "fp32")], folder, folder / "work", lambda _step: None)
    return package


def copies(package: Path, number: int, folder: Path) -> list[Path]:
    """So many copies of `package` in `folder`, each under a name of its own."""
    manifest = read_manifest(package)
    made = []
    for index in range(number):
        copy = folder / f"copy-{index}"
        shutil.copytree(package, copy, dirs_exist_ok=True)
        named = manifest.model_copy(update={"name": copy.name})
        (copy / MANIFEST_NAME).write_text(named.model_dump_json(), encoding="utf-8")
        made.append(copy)
    return made


def process_counts(cores: int) -> list[int]:
    """Powers of two up to twice as many as cores, and the cores."""
    return sorted({cores, *(1 << power for power in range((2 * cores).bit_length()))})


def _points(name: str) -> int:
    """How many points a curve has."""
    counts: Mapping[str, Sequence[object]] = {
        "sizes": MEGAPIXELS,
        "connections": CONNECTIONS,
        "batches": BATCHES,
        "labels": LABELS,
        "engines": ENGINES,
        "processes": process_counts(cores()),
    }
    return len(counts[name])


@click.command(context_settings=HELP)
@click.option("--seconds", default=8.0, help="Length of each load.")
@click.option("--only", callback=one_or_more_of(CURVES), help=f"Curves of {', '.join(CURVES)}, with commas.")
@output_option("growth.json, growth.md and growth.svg")
def main(seconds: float, only: tuple[str, ...] | None, output: Path) -> None:
    """Measure how TrimRT grows. Curves that are not measured stay as they were written."""
    exit_on_sigterm()
    TRIMRT.install()
    path = output / "growth.json"
    growth = Growth(machine=this_machine(), seconds=seconds)
    if only:
        growth = resumed(growth, path)
    curves = only or CURVES
    with steps() as progress:
        task = progress.add_task("", total=sum(map(_points, curves)))
        measuring = Measuring(growth, progress, task)
        for name in curves:
            measuring.measure(name)
    write_report(growth, markdown(growth), path, Console())
    plot(growth, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
