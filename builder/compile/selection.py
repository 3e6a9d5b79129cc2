"""`--precision best`: the fastest precision that passes the accuracy gate, on this device."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from builder.compile.packages import Package, build_package
from builder.compile.publication import staging
from builder.compile.targets.base import CompileError, Target
from builder.compile.verification import Gate, GateError
from builder.kit import GraphSource, Report
from runtime.manifest import BatchSizes, Candidate, Evidence, Precision

COMPARED: Final[tuple[Precision, ...]] = ("fp16", "int8")


def build_best(
    source: GraphSource,
    target: Target,
    output: Path,
    *,
    batch: BatchSizes,
    gate: Gate,
    command: str,
    report: Report,
) -> Package:
    """Build FP16 and INT8, measure both, and publish the one with the lower latency of a single batch.

    The published manifest says what was compared. Arguments as for `build_package`.

    Raises:
        CompileError: engines cannot be run here, so there is nothing to measure.
        GateError: neither passes; nothing was published.
    """
    if missing := target.missing_device():
        raise CompileError(
            f"--precision best has to run what it compares: {missing}. Name a precision instead"
        )
    with tempfile.TemporaryDirectory(prefix="trimrt-") as scratch:
        build = partial(build_package, source, target, batch=batch, gate=gate, command=command, report=report)
        packages: list[Package] = []
        candidates: list[Candidate] = []
        for precision in COMPARED:
            try:
                package = build(precision, Path(scratch))
            except GateError as error:
                candidates.append(Candidate(precision=precision, refused=str(error)))
            else:
                packages.append(package)
                candidates.append(_measured(package))
        if not packages:
            raise GateError("; ".join(str(candidate.refused) for candidate in candidates))
        best = min(packages, key=lambda package: _evidence(package).latency_ms)
        with staging(output / best.manifest.name) as stage:
            shutil.copytree(best.folder, stage.folder, dirs_exist_ok=True)
            manifest = stage.publish(best.manifest.model_copy(update={"candidates": candidates}))
    return replace(best, folder=output / best.manifest.name, manifest=manifest)


def _measured(package: Package) -> Candidate:
    evidence = _evidence(package)
    return Candidate(
        precision=package.manifest.precision,
        latency_ms=evidence.latency_ms,
        throughput=evidence.throughput,
        engine_top1=evidence.engine_top1,
    )


def _evidence(package: Package) -> Evidence:
    evidence = package.manifest.evidence
    assert evidence is not None, "it was built where it can run"
    return evidence
