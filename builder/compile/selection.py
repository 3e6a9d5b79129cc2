"""`--precision best`: the fastest engine that passes the accuracy gate, on this device."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final, Literal

from builder.compile.measurement import measure_in_turns
from builder.compile.packages import Package, build_package, package_name
from builder.compile.publication import next_version, write_manifest
from builder.compile.targets.base import INT8_REST, CompileError, Target
from builder.compile.verification import Gate, GateError
from builder.kit import LEFT_OUT, GraphSource, KitError, Report
from models.errors import TrimRTError
from models.files import replace_folder
from runtime.loading import load_engine
from runtime.manifest import Backend, BatchSizes, Candidate, EngineError, Evidence, LeftOut, Precision

Objective = Literal["latency", "throughput"]

# CPUs compute FP16 graphs in FP32, so FP16 is no choice of its own there.
COMPARED: Final[dict[Backend, tuple[Precision, ...]]] = {
    "openvino": ("fp32", "int8"),
    "tensorrt": ("fp16", "int8"),
    "tensorrt-rtx": ("fp16", "int8"),
}

logger = logging.getLogger("trimrt.builder")


def build_best(
    source: GraphSource,
    target: Target,
    output: Path,
    *,
    batch: BatchSizes,
    gate: Gate,
    command: str,
    report: Report,
    replace: bool = False,
    objective: Objective = "latency",
) -> Package:
    """Build INT8, the best precision beside it and mixtures of both, and publish the one that is fastest.

    They are timed in turns. The mixtures are INT8 graphs that leave more in floating point (`LEFT_OUT`). The
    published manifest says what was compared, and why a graph gave no engine. Arguments as for
    `build_package`; `objective` says whether faster is less time for the smallest batch, or more images a
    second at the largest.

    Raises:
        CompileError: engines cannot be run here, so there is nothing to measure; or none could be built.
        GateError: none passes; nothing was published.
        KitError: the source has no graph of one of the precisions.
        PublicationError: something else than an earlier package of the same network is in the way.
    """
    if missing := target.missing_device():
        raise CompileError(
            f"--precision best has to run what it compares: {missing}. Name a precision instead"
        )
    replaced = None if replace else source.student
    for precision in COMPARED[target.backend]:  # find out now, not after minutes of work
        next_version(output / package_name(source, target, precision), replaced)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as scratch:
        build = partial(build_package, source, target, batch=batch, gate=gate, command=command, report=report)
        packages: list[Package] = []
        candidates: list[Candidate] = []
        errors: list[TrimRTError] = []
        for number, (precision, left_out) in enumerate(_choices(target.backend)):
            try:
                package = build(precision, Path(scratch, str(number)), left_out=left_out)
            except (CompileError, EngineError, GateError, KitError) as error:
                if left_out is None and isinstance(error, KitError):
                    raise
                errors.append(error)
                candidates.append(Candidate(precision=precision, left_out=left_out, refused=str(error)))
                if isinstance(error, CompileError | EngineError):
                    logger.warning("%s is not compared: %s", candidates[-1].name, error)
            else:
                packages.append(package)
        if not packages:
            refused = any(isinstance(error, GateError) for error in errors)
            raise (GateError if refused else CompileError)("; ".join(dict.fromkeys(map(str, errors))))
        report("comparing speeds")
        packages = _timed_in_turns(packages)
        candidates += [_measured(package) for package in packages]
        best = max(packages, key=lambda package: _speed(package, objective))
        folder = output / best.manifest.name
        with replace_folder(folder) as new:
            shutil.copytree(best.folder, new, dirs_exist_ok=True)
            found = {
                "version": next_version(folder, replaced),
                "candidates": candidates,
            }
            manifest = best.manifest.model_copy(update=found)
            write_manifest(new, manifest)
    return dataclasses.replace(best, folder=folder, manifest=manifest)


def _choices(backend: Backend) -> list[tuple[Precision, LeftOut | None]]:
    """What is compared: precisions, and what INT8 leaves out."""
    whole: list[tuple[Precision, LeftOut | None]] = [(precision, None) for precision in COMPARED[backend]]
    return [*whole, *(("int8", part) for part in LEFT_OUT[INT8_REST[backend]])]


def _timed_in_turns(packages: Sequence[Package]) -> list[Package]:
    """The packages with new latencies and throughputs in their evidence.

    Where not all of them run at once, for want of memory, those stay that each had when it was built.
    """
    try:
        with ExitStack() as stack:
            engines = [stack.enter_context(closing(load_engine(package.folder))) for package in packages]
            speeds = measure_in_turns(engines)
    except EngineError as error:
        logger.warning("compared by what each took when it was built, since not all run at once: %s", error)
        return list(packages)
    found = []
    for package, speed in zip(packages, speeds, strict=True):
        evidence = _evidence(package).model_copy(update=asdict(speed))
        found.append(
            dataclasses.replace(package, manifest=package.manifest.model_copy(update={"evidence": evidence}))
        )
    return found


def _speed(package: Package, objective: Objective) -> float:
    """The more the better: images a second at the largest batch, or one after the other."""
    evidence = _evidence(package)
    return evidence.throughput if objective == "throughput" else 1 / evidence.latency_ms


def _measured(package: Package) -> Candidate:
    evidence, calibration = _evidence(package), package.manifest.provenance.calibration
    return Candidate(
        precision=package.manifest.precision,
        left_out=calibration.left_out if calibration is not None else None,
        latency_ms=evidence.latency_ms,
        throughput=evidence.throughput,
        engine_top1=evidence.engine_top1,
    )


def _evidence(package: Package) -> Evidence:
    evidence = package.manifest.evidence
    assert evidence is not None, "it was built where it can run"
    return evidence
