"""Graphs to engine packages: compile, verify, measure, publish."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Final

from builder.compile.measurement import measure, measure_in_turns
from builder.compile.publication import next_version, write_manifest
from builder.compile.targets.base import INT8_REST, Artefact, CompileError, Target
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate, GateError, compare, engine_logits, predictions_of
from builder.kit import (
    INPUT,
    LOGITS,
    PROBABILITIES,
    Graph,
    GraphSource,
    KitError,
    Report,
    Sparsity,
    Student,
    VerificationSet,
)
from models.files import clear_folder, replace_folder
from models.promise import Kind
from runtime.engine import Engine
from runtime.jetson import power
from runtime.loading import load_engine
from runtime.manifest import (
    BatchSizes,
    EngineError,
    Evidence,
    LeftOut,
    Manifest,
    Precision,
    Provenance,
    Rung,
    Tensor,
    sha256_of,
)

LEAST_INT8: Final = 0.5  # share of the multiply-accumulates of an INT8 engine
_SATURATES: Final = (
    ". This processor is part of the reason: it has no VNNI and adds INT8 products in 16 bits, so weights "
    "were rounded to fewer bits"
)

logger = logging.getLogger("trimrt.builder")


@dataclass(frozen=True)
class Package:
    """A published engine package.

    Attributes:
        folder: where it is.
        manifest: what it says.
        rejected: the ways to it that the gate refused, and why.
        unverified: why it could not be run here; None when it was run and passed.
        slower: how an INT8 engine compares with one without INT8, if it is no faster on this machine.
        sparsity: how many layers TensorRT's sparse kernels could take; None: the kit does not say.
    """

    folder: Path
    manifest: Manifest
    rejected: tuple[str, ...]
    unverified: str | None
    slower: str | None = None
    sparsity: Sparsity | None = None

    @property
    def missed(self) -> list[str]:
        """What the engine costs beyond what its network was to cost here, in words."""
        promise, evidence = self.manifest.promise, self.manifest.evidence
        if promise is None or evidence is None:
            return []
        found: dict[Kind, float] = {"size_mb": evidence.weights_bytes / 1e6}
        device, manifest = promise.device, self.manifest
        promised = device and (device.machine, device.backend, device.precision, device.batch)
        machine = manifest.compatibility.machine
        if promised == (machine, manifest.backend, manifest.precision, manifest.batch.min):
            found["latency_ms"] = evidence.least_ms or evidence.latency_ms
        return list(promise.missed(found))


def package_name(source: GraphSource, target: Target, precision: Precision) -> str:
    """The package's name, and its folder's."""
    return f"{source.student.name}-{precision}-{target.backend}"


def build_package(
    source: GraphSource,
    target: Target,
    precision: Precision,
    output: Path,
    *,
    batch: BatchSizes,
    gate: Gate,
    command: str,
    report: Report,
    replace: bool = False,
    left_out: LeftOut | None = None,
) -> Package:
    """Build one engine and publish it, if it passes the gate.

    The source's graphs are tried in turn until one passes.

    Args:
        source: a build kit or a prepared checkpoint.
        target: the compiler.
        precision: of the engine.
        output: folder that the package's folder goes into.
        batch: sizes to compile for.
        gate: what the engine may lose.
        command: the command that rebuilds it.
        report: takes lines of progress.
        replace: whatever network the package of that name was made of.
        left_out: what INT8 is to leave in floating point, for speed.

    Raises:
        GateError: every graph failed; nothing was published.
        CompileError: the compiler refused a graph.
        EngineError: the compiled engine does not load or run.
        KitError: the source has no such graph.
        PublicationError: something else than an earlier package of the same network is in the way.
        BusyError: another process is building this package.
    """
    name = package_name(source, target, precision)
    refused: list[Rung] = []
    with replace_folder(output / name) as folder:
        # Find out now, not after minutes of work.
        version = next_version(output / name, None if replace else source.student)
        for graph, path in source.graphs(precision, INT8_REST[target.backend], left_out):
            clear_folder(folder)
            unverified = target.missing_device()
            slower, saturates = None, False
            try:
                _require_int8(graph)
                _require_exact(graph, gate)
                artefact = target.compile(path, folder, batch, report)
                saturates = bool(artefact.saturation_safe)
                manifest = _describe(name, source.student, target, graph, artefact, folder, refused, command)
                manifest = manifest.model_copy(update={"version": version})
                if unverified is None:
                    report("verifying")
                    write_manifest(folder, manifest)
                    evidence = _verify(folder, source.verification, gate, graph.weights_bytes)
                    slower = _no_faster(folder, graph, source, target, batch, report)
                    if slower and graph.calibration and graph.calibration.higher_precision_layers:
                        raise GateError(f"it is accurate but {slower}")
                    manifest = manifest.model_copy(update={"evidence": evidence})
                else:
                    report("verifying the graph with OpenVINO")
                    unverified += f". {_verify_graph(source, graph, path, batch, gate, report)}"
            except GateError as error:
                reason = f"{error}{_SATURATES if saturates else ''}"
                refused.append(_rung(graph, reason))
                continue
            report("publishing")
            write_manifest(folder, manifest)
            rejected = tuple(_told(rung) for rung in refused)
            return Package(output / name, manifest, rejected, unverified, slower, graph.sparsity)
        raise GateError("\n  ".join([f"{name} was not published.", *map(_told, refused), *_nearest(refused)]))


def _require_int8(graph: Graph) -> None:
    """Refuse a graph that is INT8 by name only.

    Raises:
        GateError: most of its work is in floating point, and nobody asked for that.
    """
    kept = graph.calibration is not None and graph.calibration.higher_precision_layers
    if graph.int8_share is not None and graph.int8_share < LEAST_INT8 and not kept:
        raise GateError(
            f"only {graph.int8_share:.0%} of its multiply-accumulates run in INT8: the other layers are of a "
            "kind that is not quantised"
        )


def _require_exact(graph: Graph, gate: Gate) -> None:
    """Refuse a graph whose exact sums are beyond the gate's limits already: no engine mends that.

    Raises:
        GateError: that is so.
    """
    try:
        if graph.exact is not None:
            gate.check(graph.exact)
    except GateError as error:
        raise GateError(f"{error} with exact sums, before compilation") from None


def _rung(graph: Graph, refused: str | None) -> Rung:
    """What came of a graph."""
    return Rung(
        name=graph.calibration.name if graph.calibration is not None else graph.precision,
        seconds=graph.seconds,
        exact_agreement=graph.exact.label_agreement if graph.exact is not None else None,
        int8_share=graph.int8_share,
        refused=refused,
    )


def _told(rung: Rung) -> str:
    price = "" if rung.seconds is None else f" ({rung.seconds:.0f} s)"
    return f"{rung.name}{price}: {rung.refused}"


def _nearest(refused: Sequence[Rung]) -> Iterator[str]:
    """Which of several came nearest to FP32."""
    judged = [rung for rung in refused if rung.exact_agreement is not None]
    if len(judged) > 1:
        best = max(judged, key=lambda rung: rung.exact_agreement or 0)
        yield f"The nearest is {best.name}, with {best.exact_agreement:.2%} of the labels as FP32"


def _verify(folder: Path, images: VerificationSet, gate: Gate, weights_bytes: int) -> Evidence:
    """Load the engine as a server would, check it against the gate, then time it."""
    with closing(load_engine(folder)) as engine:
        logits = engine_logits(engine, images.pixels)
        comparison = images.compare(logits, engine.manifest.activation)
        gate.check(comparison)
        speed = measure(engine)
    return Evidence(
        image_set=images.name,
        **asdict(comparison),
        **asdict(speed),
        weights_bytes=weights_bytes,
        power=power(),
        predictions=predictions_of(logits[: images.originals], engine.manifest.activation),
    )


def _verify_graph(
    source: GraphSource, graph: Graph, path: Path, batch: BatchSizes, gate: Gate, report: Report
) -> str:
    """Check the graph of an engine that cannot run here against the gate, with OpenVINO instead.

    That detects a bad conversion or calibration. It says nothing about the engine itself.

    Returns:
        What was found, in words.
    """
    with trial(source.student, open_target("openvino"), graph, path, batch, report) as engine:
        comparison = compare(engine, source.verification)
    gate.check(comparison)
    top1 = "" if comparison.engine_top1 is None else f"top-1 {comparison.engine_top1:.2%}, "
    return (
        f"Its graph, run with OpenVINO, passes the gate: {top1}"
        f"agreement {comparison.label_agreement:.2%} on {comparison.told_images}"
    )


def _no_faster(
    folder: Path, graph: Graph, source: GraphSource, target: Target, batch: BatchSizes, report: Report
) -> str | None:
    """How an INT8 engine compares with one without any INT8, if it is no faster; else None.

    TensorRT takes minutes to build the other engine. It is asked only where layers were kept out of INT8.
    None, too, where the other engine cannot be had.
    """
    kept = graph.calibration is not None and graph.calibration.higher_precision_layers
    if not graph.precision.startswith("int8") or (target.backend != "openvino" and not kept):
        return None
    rest = INT8_REST[target.backend]
    try:
        other, path = next(iter(source.graphs(rest, rest)))
    except KitError:
        return None  # a kit without that graph; there is nothing to compare with
    report(f"comparing with {rest}")
    try:
        with (
            trial(source.student, target, other, path, batch, report) as plain,
            closing(load_engine(folder)) as engine,
        ):
            ours, theirs = measure_in_turns([engine, plain])
    except (CompileError, EngineError) as error:  # no reason to throw away an engine that is finished
        logger.warning("%s was not compared with %s: %s", graph.precision, rest, error)
        return None
    if ours.latency_ms < theirs.latency_ms or ours.throughput > theirs.throughput:
        return None
    return (
        f"not faster than {rest} on this machine: {ours.latency_ms:.2f} ms against "
        f"{theirs.latency_ms:.2f} ms, {ours.throughput:,.0f} images/s against {theirs.throughput:,.0f}"
    )


@contextmanager
def trial(
    student: Student, target: Target, graph: Graph, path: Path, batch: BatchSizes, report: Report
) -> Iterator[Engine]:
    """An engine for measuring only, removed at the end.

    Args:
        student: the network.
        target: the compiler.
        graph: what is in `path`.
        path: the ONNX file.
        batch: sizes to compile for.
        report: takes lines of progress.

    Raises:
        CompileError: the compiler refused the graph.
        EngineError: the compiled engine does not load.
    """
    with tempfile.TemporaryDirectory(prefix="trimrt-") as name:
        folder = Path(name)
        artefact = target.compile(path, folder, batch, report)
        write_manifest(
            folder, _describe("trial", student, target, graph, artefact, folder, [], "trimrt build")
        )
        with closing(load_engine(folder)) as engine:
            yield engine


def _describe(
    name: str,
    student: Student,
    target: Target,
    graph: Graph,
    artefact: Artefact,
    folder: Path,
    refused: Sequence[Rung],
    command: str,
) -> Manifest:
    spec = student.preprocessing
    calibration = graph.calibration
    if calibration is not None:
        calibration = calibration.model_copy(
            update={
                "tried": [rung.name for rung in refused],
                "ladder": [*refused, _rung(graph, refused=None)],
            }
        )
    return Manifest(
        name=name,
        created_at=datetime.now(timezone.utc),
        builder_version=version("trimrt"),
        backend=target.backend,
        backend_version=artefact.backend_version,
        precision=graph.precision,
        arithmetic=artefact.arithmetic,
        saturation_safe=artefact.saturation_safe if graph.precision.startswith("int8") else None,
        input=Tensor(name=INPUT, dtype="uint8", shape=[-1, spec.height, spec.width, 3], layout="NHWC"),
        outputs=[
            Tensor(name=output, dtype="float32", shape=[-1, len(student.labels)])
            for output in (LOGITS, PROBABILITIES)
        ],
        batch=artefact.batch,
        profiles=list(artefact.profiles),
        labels=student.labels,
        promise=student.promise,
        activation=student.activation,
        preprocessing=spec,
        compatibility=artefact.compatibility,
        provenance=Provenance(
            checkpoint_sha256=student.checkpoint_sha256,
            onnx_sha256=graph.sha256,
            artefact=artefact.file,
            artefact_sha256=sha256_of(folder / artefact.file),
            artefact_bytes=(folder / artefact.file).stat().st_size,
            calibration=calibration,
            int8_share=graph.int8_share,
            source=student.source,
            parameters=student.parameters,
            macs=student.macs,
        ),
        build_command=command,
    )
