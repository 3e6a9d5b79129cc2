"""A network's latency table on this machine: what `trimrt measure-layers` calls, from Python too."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder.api import DEFAULT_PRECISIONS
from builder.compile.latency import Subject, measure_latencies
from builder.compile.targets.base import INT8_REST
from builder.compile.targets.choice import choose_backend, open_target
from builder.finding import LIBRARIES, MissingSourceError, find_source
from builder.kit import Graph, Rest, Student, is_kit, open_kit
from builder.observer import BuildObserver
from builder.prepare.export import importing
from models.estimate import in_words
from models.files import replace_file, require_writable
from models.latency import LatencyTable, read_latency_table
from runtime.manifest import Backend, Precision


@dataclass(frozen=True)
class LatencyOptions:
    """What a latency table is about.

    Attributes:
        precision: of the engines; None: INT8, of TensorRT-RTX FP16.
        target: compiler; `auto` is TensorRT where it and a GPU are, else OpenVINO.
        batch: images in a batch.
        image_size: side of an architecture's input, in pixels. A kit and a checkpoint have their own.
        classes: of an architecture.
        stem: of an architecture; `auto` is small below 96 pixels, as `trimrt compress` has it.
    """

    precision: Precision | None = None
    target: Backend | Literal["auto"] = "auto"
    batch: int = 1
    image_size: int = 224
    classes: int = 1000
    stem: Literal["auto", "standard", "small"] = "auto"


def measure_layers(
    source: str | Path,
    output: str | Path,
    options: LatencyOptions | None = None,
    observer: BuildObserver | None = None,
) -> LatencyTable:
    """Time networks of one architecture, narrowed in many ways, and write what that tells to a file.

    An unfinished table in that file is continued; so a call that was interrupted can be made again.

    Args:
        source: a build kit's folder, which needs nothing more; a checkpoint, or an architecture such as
            `resnet18` or `timm:NAME`, which need `pip install 'trimrt[compress]'`.
        output: the JSON file.
        options: what is measured; None: an engine of the default precision for this machine.
        observer: follows the measurement.

    Raises:
        LatencyError: no channels can be narrowed, or the file is a table of another network or machine.
        CheckpointError, ExportError, KitError, MissingSourceError, NetworkError: the source cannot be used.
        CompileError, EngineError: the compiler refused a graph, or an engine does not run here.
    """
    output, options, observer = Path(output), options or LatencyOptions(), observer or BuildObserver()
    require_writable(output.parent)
    backend = options.target
    if backend == "auto":
        backend, reason = choose_backend()
        observer.chose_target(backend, reason)
    target = open_target(backend)
    precision = options.precision or DEFAULT_PRECISIONS[backend][0]
    with _open(str(source), precision, INT8_REST[backend], options, observer) as (student, graph, path):
        return measure_subject(Subject(student, graph, path, target, options.batch), output, observer)


def measure_subject(subject: Subject, output: Path, observer: BuildObserver) -> LatencyTable:
    """Time networks of one graph, and write what that tells to a file; otherwise as `measure_layers`."""
    begun = read_latency_table(output) if output.exists() else None

    def save(table: LatencyTable) -> None:
        with replace_file(output) as new:
            new.write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")

    return measure_latencies(subject, begun, save, observer.report, _telling(observer))


@contextmanager
def _open(
    source: str, precision: Precision, rest: Rest, options: LatencyOptions, observer: BuildObserver
) -> Iterator[tuple[Student, Graph, Path]]:
    """The network, its graph, and the file that this is in."""
    try:
        place = None if source.startswith(LIBRARIES) else Path(find_source(source))
    except MissingSourceError as missing:
        if not _is_architecture(source):
            raise MissingSourceError(f"{missing}; nor is there such an architecture") from None
        place = None
    if place is not None and is_kit(place):
        observer.report("checking the build kit")
        kit = open_kit(place)
        graph, path = next(kit.graphs(precision, rest))
        yield kit.student, graph, path
        return
    observer.report("importing")
    with importing(source, "measure its kit"):
        from builder.prepare.for_timing import random_network, timing_graph, trained_network
    network, student = (
        trained_network(place)
        if place is not None
        else random_network(source, options.classes, options.image_size, options.stem)
    )
    with tempfile.TemporaryDirectory(prefix="trimrt-") as folder:
        observer.report(f"exporting {student.name}")
        graph, path = timing_graph(network, student.preprocessing, precision, rest, Path(folder))
        yield student, graph, path


def _is_architecture(name: str) -> bool:
    try:
        from models.networks import architectures
    except ImportError:
        return False
    return name in architectures()


def _telling(observer: BuildObserver) -> Callable[[float], None]:
    """Tells how much is timed, and how long the rest will take."""
    began: list[tuple[float, float]] = []

    def tell(share: float) -> None:
        began.append((time.monotonic(), share))
        (start, before), (now, _) = began[0], began[-1]
        left = ""
        if share > before:
            left = f", about {in_words((now - start) * (1 - share) / (share - before))} left"
        observer.report(f"timing networks of other widths: {share:.0%} done{left}")

    return tell
