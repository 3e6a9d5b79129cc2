"""Running everything that was found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from builder.compile.measurement import time_in_turns
from models.datasets import DatasetError, OnDamaged
from runtime.profiling import profile_layers
from trimrt.report.assembling import assemble
from trimrt.report.data import Choice, DataSets, checkpoint_of, data_of_checkpoint, data_of_package
from trimrt.report.discovery import Checkpoint, EnginePackage, Found, ReportError
from trimrt.report.entries import Entry, Item, group_key
from trimrt.report.quantisation import layer_errors, layer_ranges, layer_titles, read_graph
from trimrt.report.results import Accuracy, Agreement, Latency, LayerTime, Mistake, Report
from trimrt.report.statistics import wilson_interval
from trimrt.report.subjects import open_subject

_STEP: Final = 256  # images between two moves of the progress bar
_PROFILES: Final = 5  # of which each layer's median counts: one interruption spoils one of them only
_PROFILE_RUNS: Final = 20


class Progress(Protocol):
    """Called with the current step, and the share of it that is done."""

    def __call__(self, text: str, share: float | None = None) -> None:
        """`share` is None where it is not known."""


def measure(
    found: Found,
    *,
    data: str | None,
    on_damaged: OnDamaged,
    seconds: float,
    sensitivity: bool,
    command: str,
    progress: Progress,
    note: Callable[[str], None],
) -> Report:
    """Run all that was found and can run here.

    Args:
        found: checkpoints and packages.
        data: data set to measure all on; None: each on its own.
        on_damaged: what to do about images of `data` that cannot be read.
        seconds: to time all models in turns for.
        sensitivity: rank the layers of INT8 packages.
        command: what the user typed.
        progress: told where the work stands.
        note: takes each line of what was found in folders of images.

    Raises:
        EngineError: an engine that had run stopped running.
        ReportError: there is no such data.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    data_sets = DataSets(data, on_damaged, note)
    if data is not None:
        try:
            data_sets.named(data, 0)
        except DatasetError as error:
            raise ReportError(str(error)) from error
    entries = _enter(found, data_sets)
    for entry in entries:
        progress(f"opening {entry.item.folder}", entry.number / len(entries))
        _open(entry)
    for entry in entries:
        _predict(entry, data_sets, progress)
    for entry in entries:
        _compare(entry, entries)
    _time(entries, seconds, progress)
    for entry in entries:
        _profile(entry, progress)
        _quantisation(entry, found, sensitivity, progress)
    return assemble(entries, found.left_out, seconds=seconds, command=command, load=load)


def _enter(found: Found, data_sets: DataSets) -> list[Entry]:
    """What was found, numbered, those of one data set next to each other."""
    chosen: list[tuple[Item, Choice]] = [
        *((item, data_of_checkpoint(item.card, data_sets)) for item in found.checkpoints),
        *((item, data_of_package(item.manifest, found.checkpoints, data_sets)) for item in found.packages),
    ]
    groups = list(dict.fromkeys(group_key(item, choice) for item, choice in chosen))
    chosen.sort(key=lambda pair: groups.index(group_key(*pair)))
    return [Entry(number, item, choice) for number, (item, choice) in enumerate(chosen, 1)]


def _open(entry: Entry) -> None:
    with entry.noting("accuracy", "agreement", "latency", "profile"):
        item = entry.item
        try:
            entry.subject = open_subject(
                item.folder, item.card if isinstance(item, Checkpoint) else item.manifest
            )
        except ImportError as error:
            raise ReportError(f"running it needs `pip install 'trimrt[compress]'` ({error})") from error


def _predict(entry: Entry, data_sets: DataSets, progress: Progress) -> None:
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


def _compare(entry: Entry, entries: Sequence[Entry]) -> None:
    """Compare a model with its reference: the checkpoint of an engine, the ancestor of a checkpoint."""
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
        reference = next((other for other in family if other is not entry and other.is_fp32), None)
        reason = "neither the checkpoint that it was built from nor its FP32 engine is in this report"
    if reference is None:
        entry.missing.setdefault("agreement", reason)
    elif entry.labels is None or reference.labels is None:
        entry.missing.setdefault("agreement", f"it or its reference, #{reference.number}, was not run")
    elif entry.labels.shape != reference.labels.shape or entry.group != reference.group:
        entry.missing.setdefault("agreement", f"its reference, #{reference.number}, has other test images")
    else:
        share = float(np.mean(entry.labels == reference.labels))
        entry.measured["agreement"] = Agreement(reference=reference.number, share=share)


def _time(entries: Sequence[Entry], seconds: float, progress: Progress) -> None:
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


def _profile(entry: Entry, progress: Progress) -> None:
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
    """OpenVINO appends its transformations to a node's name."""
    return titles.get(name.split("/WithoutBiases")[0]) or titles.get(name) or name.replace("network/", "")


def _quantisation(entry: Entry, found: Found, sensitivity: bool, progress: Progress) -> None:
    if isinstance(entry.item, Checkpoint) or entry.item.manifest.precision != "int8":
        reason = "only static INT8 engines have calibrated ranges"
        if isinstance(entry.item, EnginePackage) and entry.item.manifest.precision == "int8-dynamic":
            reason = "dynamic INT8 finds its activation ranges for every image"
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
