"""The device that a network is fitted to: its latency table, and engines that are tried out."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from builder.api import DEFAULT_PRECISIONS
from builder.compile.latency import Subject, time_like
from builder.compile.targets.base import INT8_REST, Target
from builder.compile.targets.choice import choose_backend, open_target
from builder.kit import Graph, Student
from builder.latency import measure_subject
from builder.observer import BuildObserver
from builder.prepare.for_timing import timing_graph, without_zeros
from builder.prepare.sources import package_name
from models.evaluation import count_macs
from models.files import replace_file
from models.fitting import Trial
from models.groups import ChannelGroups
from models.latency import LatencyTable, read_latency_table
from models.networks import classifier_head
from models.preprocessing import Preprocessing
from runtime.manifest import Backend, EngineError, Precision


@dataclass(frozen=True)
class FittingDevice:
    """A device by its latency table; `models.compress` fits networks to it.

    Attributes:
        table_file: of a table that was measured on the device; None: it is this machine, and is measured.
        observe: opens what follows the measurement.
    """

    table_file: Path | None = None
    observe: Callable[[], AbstractContextManager[BuildObserver]] = lambda: nullcontext(BuildObserver())

    def open_table(
        self, network: nn.Module, name: str, spec: Preprocessing, file: Path, other: Path | None = None
    ) -> LatencyTable:
        """The table that was given, or this machine's, which is in `file` or is made there.

        If `file` is of another network, it is replaced; `other` is copied there if it is of this one.

        Raises:
            LatencyError: it cannot be read, or no channels of the network can be narrowed.
            CompileError, EngineError, ExportError: this machine cannot be measured.
        """
        if self.table_file is not None:
            return read_latency_table(self.table_file)
        file.parent.mkdir(parents=True, exist_ok=True)
        _keep_only_its_own(network, spec, file, other)
        if file.exists() and not (table := read_latency_table(file)).missing():
            return table
        with self.observe() as observer, tempfile.TemporaryDirectory(prefix="trimrt-") as folder:
            observer.report(f"exporting {name}")
            backend, _ = choose_backend()
            student, graph, path = _export(
                without_zeros(copy.deepcopy(network)), name, spec, backend, None, Path(folder)
            )
            return measure_subject(Subject(student, graph, path, open_target(backend), 1), file, observer)

    def try_out(self, network: nn.Module, spec: Preprocessing, table: LatencyTable | None) -> Trial:
        """Build an engine as the table's were, or one of the default precision here, and measure it.

        Raises:
            CompileError, EngineError, ExportError: there is no engine of such a network.
        """
        backend = choose_backend()[0] if table is None else cast(Backend, table.backend)
        precision = None if table is None else cast(Precision, table.precision)
        with tempfile.TemporaryDirectory(prefix="trimrt-") as folder:
            student, graph, path = _export(network, "trial", spec, backend, precision, Path(folder))
            latency_ms = None
            if table is not None and (target := _installed(backend)) is not None:
                latency_ms = time_like(table, Subject(student, graph, path, target, table.batch))
        return Trial(latency_ms, graph.weights_bytes / 1e6)


def _keep_only_its_own(network: nn.Module, spec: Preprocessing, file: Path, other: Path | None) -> None:
    """Remove the file if it is another network's table; copy the other one there if it is this network's."""
    channels, macs = ChannelGroups(network, spec).channels, count_macs(network, spec.height, spec.width)

    def is_its_own(place: Path) -> bool:
        return place.exists() and read_latency_table(place).difference(channels, macs) is None

    if not is_its_own(file):
        file.unlink(missing_ok=True)
        if other is not None and is_its_own(other):
            with replace_file(file) as new:
                shutil.copyfile(other, new)


def _export(
    network: nn.Module,
    name: str,
    spec: Preprocessing,
    backend: Backend,
    precision: Precision | None,
    folder: Path,
) -> tuple[Student, Graph, Path]:
    """The network as a student, its graph, and the file that this is in."""
    precision = precision or DEFAULT_PRECISIONS[backend][0]
    graph, path = timing_graph(network, spec, precision, INT8_REST[backend], folder)
    student = Student(
        name=package_name(name),
        labels=[str(number) for number in range(classifier_head(network)[1].weight.shape[0])],
        preprocessing=spec,
        checkpoint_sha256=None,
        parameters=None,
        macs=count_macs(network, spec.height, spec.width),
    )
    return student, graph, path


def _installed(backend: Backend) -> Target | None:
    """The compiler; None: it is not on this machine."""
    try:
        return open_target(backend)
    except EngineError:
        return None
