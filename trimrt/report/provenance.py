"""Where a model came from, in lines that a reader can check."""

from __future__ import annotations

from pathlib import Path

from models.card import Card
from models.promise import Promise
from runtime.manifest import Calibration, Candidate, Compatibility, EngineError, Manifest
from runtime.tensorrt.layers import LAYERS_NAME, read_layers, summarise
from trimrt.report.results import Fact


def facts_of_checkpoint(card: Card) -> list[Fact]:
    """What a card says of its origin."""
    data = card.dataset
    part = f", fold {data.fold} of {data.folds}" if data.fold is not None else ""
    lines = {
        "made by": card.command,
        "trained on": f"{data.name}{part}: {data.train_images} training, {data.validation_images} "
        f"validation, {data.test_images} test images; {data.split}",
        "pruned for": _promised(card.promise),
        "seed": str(card.seed),
        "made from": ", ".join(
            f"{ancestor.name} ({ancestor.architecture}, {ancestor.weights_sha256[:12]}…)"
            for ancestor in card.lineage
        ),
        "with": _versions(card.versions),
        "weights SHA-256": card.weights_sha256,
        "data SHA-256": data.sha256,
    }
    return _facts(lines)


def facts_of_package(folder: Path, manifest: Manifest) -> list[Fact]:
    """What a package says of its origin."""
    origin = manifest.provenance
    lines = {
        "built by": manifest.build_command,
        "version": f"{manifest.version}, {manifest.created_at:%Y-%m-%d %H:%M:%S %Z}, "
        f"by TrimRT {manifest.builder_version}",
        "compiled with": f"{manifest.backend} {manifest.backend_version}",
        "compiled for": _machine(manifest.compatibility),
        "activation": "" if manifest.activation == "softmax" else "sigmoid: any number of labels may be true",
        "batch": f"{manifest.batch.min} to {manifest.batch.max}, best at {manifest.batch.opt}",
        "calibration": calibration_text(origin.calibration) if origin.calibration else "",
        "pruned for": _promised(manifest.promise),
        "layers": _layers(folder),
        "chosen from": "; ".join(_candidate(candidate) for candidate in manifest.candidates),
        "checkpoint SHA-256": origin.checkpoint_sha256 or "none: an ONNX graph from elsewhere",
        "ONNX SHA-256": origin.onnx_sha256,
        f"{origin.artefact} SHA-256": origin.artefact_sha256,
    }
    return _facts(lines)


def calibration_text(calibration: Calibration) -> str:
    """How an INT8 graph got its ranges."""
    ways = ", ".join([calibration.method, *calibration.changes])
    text = f"{ways}, {calibration.images} training images, seed {calibration.seed}"
    if calibration.fine_tuning:
        tuning = calibration.fine_tuning
        text += f"; fine-tuned for {tuning.epochs} epochs on {tuning.images}"
    if calibration.tried:
        text += f"; failed the gate before: {', '.join(calibration.tried)}"
    if calibration.higher_precision_layers:
        text += f"; kept in higher precision: {', '.join(calibration.higher_precision_layers)}"
    if calibration.left_out:
        text += f"; left out of INT8: {calibration.left_out}"
    return text


def _promised(promise: Promise | None) -> str:
    return "" if promise is None else "; ".join(promise.lines())


def _layers(folder: Path) -> str:
    """What the graph became, where the package has a list of it, as those for TensorRT do."""
    if not (folder / LAYERS_NAME).exists():
        return ""
    try:
        return summarise(read_layers(folder))
    except EngineError as error:
        return str(error)


def _facts(lines: dict[str, str]) -> list[Fact]:
    return [Fact(term=term, text=text) for term, text in lines.items() if text]


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _machine(machine: Compatibility) -> str:
    parts = [machine.gpu_name or machine.cpu_name, f"{machine.os} {machine.cpu_architecture}"]
    if machine.compute_capability:
        parts.append(f"compute capability {machine.compute_capability}")
    if machine.l4t:
        parts.append(f"L4T {machine.l4t}")
    return ", ".join(part for part in parts if part)


def _candidate(candidate: Candidate) -> str:
    if candidate.refused:
        return f"{candidate.name}: refused, {candidate.refused}"
    if candidate.latency_ms is None:
        return candidate.name
    return f"{candidate.name}: {candidate.latency_ms:.2f} ms"
