"""Running everything that was found, and writing down what came out."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from builder.export import ExportError
from builder.measurement import time_in_turns
from builder.report.data import Choice, DataSets, checkpoint_of, data_of_checkpoint, data_of_package
from builder.report.discovery import Checkpoint, EnginePackage, Found, ReportError
from builder.report.provenance import facts_of_checkpoint, facts_of_package
from builder.report.quantisation import layer_errors, layer_ranges, layer_titles, read_graph
from builder.report.results import (
    Accuracy,
    Agreement,
    Claim,
    Group,
    Latency,
    LayerTime,
    Measured,
    Mistake,
    Model,
    Report,
)
from builder.report.statistics import wilson_interval
from builder.report.subjects import Subject, open_subject
from models.card import WEIGHTS_NAME, CheckpointError
from models.datasets import DatasetError
from server.engines.openvino import this_machine
from server.manifest import EngineError
from server.profiling import profile_layers

_STEP: Final = 256  # images between two moves of the progress bar
_PROFILES: Final = 5  # of which each layer's median counts: one interruption spoils one of them only
_PROFILE_RUNS: Final = 20
_BUSY: Final = 0.5  # load above which other work is likely to disturb the timings, as a share of the cores
_LIBRARIES: Final = ("trimrt", "numpy", "openvino", "torch", "onnxruntime")
_FAULTS: Final = (CheckpointError, DatasetError, EngineError, ExportError, ReportError)


class Progress(Protocol):
    """Told what is being done, and which share of it is done."""

    def __call__(self, text: str, share: float | None = None) -> None:
        """`share` is None where it is not known."""


@dataclass
class _Entry:
    """A model being measured."""

    number: int
    item: Checkpoint | EnginePackage
    choice: Choice
    subject: Subject | None = None
    labels: NDArray[np.int64] | None = None
    missing: dict[Measured, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.item.card.name if isinstance(self.item, Checkpoint) else self.item.manifest.name

    @property
    def weights(self) -> str | None:
        """Hash of the checkpoint's weights, whether it is one or was built from one."""
        if isinstance(self.item, Checkpoint):
            return self.item.card.weights_sha256
        return self.item.manifest.provenance.checkpoint_sha256

    @contextmanager
    def noting(self, *what: Measured) -> Iterator[None]:
        """What goes wrong inside is why that could not be measured, and nothing else's concern."""
        try:
            yield
        except _FAULTS as error:
            self.missing |= dict.fromkeys(what, " ".join(str(error).split()))


def measure(
    found: Found, *, data: str | None, seconds: float, sensitivity: bool, command: str, progress: Progress
) -> Report:
    """Run all that was found and can run here.

    Args:
        found: checkpoints and packages.
        data: data set to measure all on; None: each on its own.
        seconds: to time all models in turns for.
        sensitivity: rank the layers of INT8 packages.
        command: what the user typed.
        progress: told where the work stands.

    Raises:
        EngineError: an engine that had run stopped running.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    data_sets = DataSets(data)
    items: list[Checkpoint | EnginePackage] = [*found.checkpoints, *found.packages]
    entries = []
    for number, item in enumerate(items, 1):
        progress(f"opening {item.folder}", number / len(items))
        entries.append(_open(number, item, found, data_sets))
    for entry in entries:
        _predict(entry, data_sets, progress)
    for entry in entries:
        _compare(entry, entries)
    _time(entries, seconds, progress)
    for entry in entries:
        _profile(entry, progress)
        _quantisation(entry, found, sensitivity, progress)
    groups = _groups(entries)
    labels = _labels(entries)
    return Report(
        created_at=datetime.now(timezone.utc),
        command=command,
        machine=_machine(entries, load),
        versions=_versions(),
        timing_seconds=seconds,
        groups=list(groups.values()),
        models=[
            _model(entry, label, list(groups).index(_group_key(entry)))
            for entry, label in zip(entries, labels, strict=True)
        ],
        left_out=found.left_out,
        cautions=_cautions(load),
    )


def _open(number: int, item: Checkpoint | EnginePackage, found: Found, data_sets: DataSets) -> _Entry:
    if isinstance(item, Checkpoint):
        entry = _Entry(number, item, data_of_checkpoint(item.card, data_sets))
    else:
        entry = _Entry(number, item, data_of_package(item.manifest, found.checkpoints, data_sets))
    with entry.noting("accuracy", "agreement", "latency", "profile"):
        described_by = item.card if isinstance(item, Checkpoint) else item.manifest
        try:
            entry.subject = open_subject(item.folder, described_by)
        except ImportError as error:
            raise ReportError(f"running it needs `pip install 'trimrt[compress]'` ({error})") from error
    return entry


def _predict(entry: _Entry, data_sets: DataSets, progress: Progress) -> None:
    split = entry.choice.split
    if split is None:
        entry.missing.setdefault("accuracy", entry.choice.reason)
    if split is None or entry.subject is None:
        return
    with entry.noting("accuracy"):
        pixels = data_sets.test_pixels(split, entry.subject.spec)
        parts = []
        for start in range(0, len(pixels), _STEP):
            progress(f"#{entry.number} {entry.name}: {len(pixels)} test images", start / len(pixels))
            parts.append(entry.subject.labels(pixels[start : start + _STEP]))
        entry.labels = np.concatenate(parts)
        entry.measured["accuracy"] = score(entry.labels, split.test.targets)


def score(labels: NDArray[np.int64], targets: NDArray[np.int64]) -> Accuracy:
    """Accuracy and confusion of predicted class indices, both of shape (N,)."""
    wrong = labels != targets
    pairs, counts = np.unique(np.stack([targets[wrong], labels[wrong]]), axis=1, return_counts=True)
    right = len(targets) - int(wrong.sum())
    low, high = wilson_interval(right, len(targets))
    return Accuracy(
        images=len(targets),
        wrong=int(wrong.sum()),
        top1=right / len(targets),
        low=low,
        high=high,
        mistakes=[
            Mistake(true=int(true), predicted=int(predicted), images=int(count))
            for (true, predicted), count in zip(pairs.T, counts, strict=True)
        ],
    )


def _compare(entry: _Entry, entries: Sequence[_Entry]) -> None:
    """Hold a model against its reference: what an engine was built from, what a student was made from."""
    if isinstance(entry.item, Checkpoint):
        ancestors = [ancestor.weights_sha256 for ancestor in reversed(entry.item.card.lineage)]
        reference = next(
            (
                other
                for ancestor in ancestors
                for other in entries
                if isinstance(other.item, Checkpoint) and ancestor and other.weights == ancestor
            ),
            None,
        )
        reason = "none of the checkpoints that it was made from is in this report"
        if not ancestors:
            reason = "it was not made from another checkpoint"
    else:
        family = [other for other in entries if entry.weights and other.weights == entry.weights]
        family.sort(key=lambda other: isinstance(other.item, EnginePackage))  # the checkpoint first
        reference = next((other for other in family if other is not entry and _is_fp32(other)), None)
        reason = "neither the checkpoint that it was built from nor its FP32 engine is in this report"
    if reference is None:
        entry.missing.setdefault("agreement", reason)
    elif entry.labels is None or reference.labels is None:
        entry.missing.setdefault("agreement", f"it or its reference, #{reference.number}, was not run")
    elif entry.labels.shape != reference.labels.shape or _group_key(entry) != _group_key(reference):
        entry.missing.setdefault("agreement", f"its reference, #{reference.number}, has other test images")
    else:
        share = float(np.mean(entry.labels == reference.labels))
        entry.measured["agreement"] = Agreement(reference=reference.number, share=share)


def _is_fp32(entry: _Entry) -> bool:
    return isinstance(entry.item, Checkpoint) or entry.item.manifest.precision == "fp32"


def _time(entries: Sequence[_Entry], seconds: float, progress: Progress) -> None:
    running = [(entry, entry.subject) for entry in entries if entry.subject is not None]
    with ExitStack() as stack:
        runs = [subject.stopwatch(stack) for _, subject in running]
        if not runs:
            return
        text = f"timing {len(runs)} models in turns"
        progress(text, 0)
        times = time_in_turns(runs, seconds=seconds, progress=lambda share: progress(text, share))
    for (entry, subject), milliseconds in zip(running, times, strict=True):
        entry.measured["latency"] = Latency(
            batch=subject.batch,
            runs=len(milliseconds),
            median_ms=float(np.median(milliseconds)),
            best_ms=float(milliseconds.min()),
            p10_ms=float(np.percentile(milliseconds, 10)),
            p90_ms=float(np.percentile(milliseconds, 90)),
        )


def _profile(entry: _Entry, progress: Progress) -> None:
    """Each layer's median over a few profiles, by the network's own names where the graph tells them."""
    if isinstance(entry.item, Checkpoint):
        entry.missing["profile"] = "only engines are profiled"
    if entry.subject is None or not isinstance(entry.item, EnginePackage):
        return
    package = entry.item
    titles: dict[str, str] = {}
    with suppress(ReportError):  # without the graph, the backend's own names have to do
        titles = layer_titles(read_graph(package))
    with entry.noting("profile"):
        profiles = []
        for number in range(_PROFILES):
            progress(f"#{entry.number} {entry.name}: layer by layer", number / _PROFILES)
            layers = profile_layers(package.folder, entry.subject.batch, _PROFILE_RUNS)
            profiles.append({(layer.name, layer.kind, layer.kernel): layer.mean_ms for layer in layers})
        # A layer too fast for the backend's clock is missing from some profiles: it took no time there.
        names = dict.fromkeys(name for profile in profiles for name in profile)
        entry.measured["profile"] = [
            LayerTime(
                name=name,
                kind=kind,
                kernel=kernel,
                mean_ms=float(np.median([profile.get((name, kind, kernel), 0.0) for profile in profiles])),
                title=_title(name, titles),
            )
            for name, kind, kernel in names
        ]


def _title(name: str, titles: dict[str, str]) -> str:
    """OpenVINO appends to a node's name what it did to it."""
    return titles.get(name.split("/WithoutBiases")[0]) or titles.get(name) or name.replace("network/", "")


def _quantisation(entry: _Entry, found: Found, sensitivity: bool, progress: Progress) -> None:
    if isinstance(entry.item, Checkpoint) or entry.item.manifest.precision != "int8":
        reason = "only static INT8 engines have calibrated ranges"
        if isinstance(entry.item, EnginePackage) and entry.item.manifest.precision == "int8-dynamic":
            reason = "dynamic INT8 finds its activation ranges anew for every image"
        entry.missing |= {"ranges": reason, "sensitivity": reason}
        return
    package = entry.item
    with entry.noting("ranges", "sensitivity"):
        entry.measured["ranges"] = layer_ranges(read_graph(package))
        checkpoint, split = checkpoint_of(package, found.checkpoints), entry.choice.split
        if not sensitivity:
            entry.missing["sensitivity"] = "left out with --no-sensitivity"
        elif checkpoint is None:
            entry.missing["sensitivity"] = "the checkpoint that it was built from is not in this report"
        elif split is None:
            entry.missing["sensitivity"] = entry.choice.reason
        else:
            report: Callable[[str], None] = lambda text: progress(f"#{entry.number} {entry.name}: {text}")  # noqa: E731
            with entry.noting("sensitivity"):
                entry.measured["sensitivity"] = layer_errors(
                    package, checkpoint.folder, found.packages, split, report
                )


_GroupKey = tuple[str, int | None, tuple[str, ...]]


def _group_key(entry: _Entry) -> _GroupKey:
    """What models must share to be compared: their test images, or at least their classes."""
    split, card, item = entry.choice.split, entry.choice.card, entry.item
    if split is not None:
        return split.sha256, split.fold, tuple(split.labels)
    if card is not None:
        return card.dataset.sha256, card.dataset.fold, tuple(card.labels)
    labels = item.card.labels if isinstance(item, Checkpoint) else item.manifest.labels
    return "", None, tuple(labels)


def _groups(entries: Sequence[_Entry]) -> dict[_GroupKey, Group]:
    """The data sets, in the order of their first models."""
    groups: dict[_GroupKey, Group] = {}
    for entry in entries:
        key = _group_key(entry)
        split, card = entry.choice.split, entry.choice.card
        labels = list(key[2])
        if split is not None and (key not in groups or groups[key].class_images is None):
            groups[key] = Group(
                name=split.name,
                source=split.source,
                split=split.description,
                fold=split.fold,
                folds=split.folds,
                sha256=split.sha256,
                test_images=len(split.test),
                labels=labels,
                class_images=np.bincount(split.test.targets, minlength=len(labels)).tolist(),
            )
        elif key in groups:
            continue
        elif card is not None:
            known = card.dataset
            groups[key] = Group(
                name=known.name,
                source=known.source,
                split=known.split,
                fold=known.fold,
                folds=known.folds,
                sha256=known.sha256,
                test_images=known.test_images,
                labels=labels,
            )
        else:
            groups[key] = Group(name="unknown data", labels=labels)
    return groups


def _labels(entries: Sequence[_Entry]) -> list[str]:
    """The models' names, each told from others of that name by the end of its path."""
    labels = []
    for entry in entries:
        others = [other for other in entries if other.name == entry.name and other is not entry]
        parts = entry.item.folder.absolute().parts
        depth = 2
        while depth < len(parts) and any(
            other.item.folder.absolute().parts[-depth:] == parts[-depth:] for other in others
        ):
            depth += 1
        labels.append(f"{entry.name} ({'/'.join(parts[-depth:])})" if others else entry.name)
    return labels


def _model(entry: _Entry, label: str, group: int) -> Model:
    item, measured = entry.item, entry.measured
    accuracy: Accuracy | None = measured.get("accuracy")
    common: dict[str, Any] = {
        "number": entry.number,
        "label": label,
        "name": entry.name,
        "path": str(item.folder),
        "group": group,
        "missing": {what: reason for what, reason in entry.missing.items() if what not in measured},
        "notes": [entry.choice.caution] if entry.choice.caution else [],
        "architecture": entry.choice.card.architecture if entry.choice.card else None,
    }
    common.update(measured)
    if isinstance(item, Checkpoint):
        card, metrics, split = item.card, item.card.metrics, entry.choice.split
        same_images = split and split.sha256 == card.dataset.sha256 and metrics.images == len(split.test)
        if accuracy is not None and same_images and accuracy.wrong != metrics.wrong:
            common["notes"].append(
                f"its card says {metrics.wrong} wrong of {metrics.images}; measured here: {accuracy.wrong}"
            )
        return Model(
            kind="checkpoint",
            role=card.role,
            precision="fp32",
            parameters=metrics.parameters,
            macs=metrics.macs,
            size_bytes=_size(item.folder / WEIGHTS_NAME),
            claim=Claim(top1=metrics.accuracy, images=metrics.images, image_set="its card"),
            provenance=facts_of_checkpoint(card),
            **common,
        )
    manifest = item.manifest
    evidence = manifest.evidence
    return Model(
        kind="engine",
        backend=manifest.backend,
        precision=manifest.precision,
        parameters=manifest.provenance.parameters,
        macs=manifest.provenance.macs,
        size_bytes=_size(item.folder / manifest.provenance.artefact),
        claim=None
        if evidence is None
        else Claim(top1=evidence.engine_top1, images=evidence.images, image_set=evidence.image_set),
        evidence=evidence,
        provenance=facts_of_package(manifest),
        **common,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _machine(entries: Sequence[_Entry], load: float) -> dict[str, str]:
    here = this_machine()
    machine = {
        "processor": here.cpu_name or here.cpu_architecture,
        "cores": str(_cores()),
        "system": platform.platform(),
        "load before": f"{load:.2f}",
    }
    gpus = {
        entry.item.manifest.compatibility.gpu_name
        for entry in entries
        if entry.subject is not None and isinstance(entry.item, EnginePackage)
    }
    if named := sorted(gpu for gpu in gpus if gpu):
        machine["GPU"] = ", ".join(named)
    return machine


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _cautions(load: float) -> list[str]:
    if load <= _BUSY * _cores():
        return []
    return [
        f"The machine was busy when this began (load {load:.1f} on {_cores()} cores). Latencies were taken "
        "in turns, so that their order means something; the milliseconds themselves may be too high."
    ]
