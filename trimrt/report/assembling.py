"""Writing down what was measured: from entries to the report's data."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import numpy as np

from models.card import WEIGHTS_NAME, Dataset
from models.cores import cores
from runtime.openvino import this_machine
from trimrt.report.discovery import Checkpoint, EnginePackage
from trimrt.report.entries import Entry, GroupKey
from trimrt.report.provenance import facts_of_checkpoint, facts_of_package
from trimrt.report.results import Accuracy, Claim, Group, LeftOut, Model, Report

_BUSY: Final = 0.5  # load above which other work is likely to disturb the timings, as a share of the cores
_LIBRARIES: Final = ("trimrt", "numpy", "openvino", "torch", "onnxruntime")


def assemble(
    entries: Sequence[Entry], left_out: list[LeftOut], *, seconds: float, command: str, load: float
) -> Report:
    """The report of measured `entries`, those of one data set next to each other.

    Args:
        entries: in the report's order.
        left_out: what was found and is not among them.
        seconds: that all models were timed for.
        command: what the user typed.
        load: the machine's, before all this.
    """
    groups = _groups(entries)
    keys = list(groups)
    return Report(
        created_at=datetime.now(timezone.utc),
        command=command,
        machine=_machine(entries, load),
        versions=_versions(),
        timing_seconds=seconds,
        groups=list(groups.values()),
        models=[
            _model(entry, label, keys.index(entry.group))
            for entry, label in zip(entries, _labels(entries), strict=True)
        ],
        left_out=left_out,
        cautions=_cautions(load),
    )


def _groups(entries: Sequence[Entry]) -> dict[GroupKey, Group]:
    """The data sets, in the order of their first models."""
    groups: dict[GroupKey, Group] = {}
    for entry in entries:
        key = entry.group
        split, card = entry.choice.split, entry.choice.card
        if key in groups and (split is None or groups[key].class_images is not None):
            continue
        labels = list(key[2])
        known = split.card() if split else card.dataset if card else None
        if known is None:
            groups[key] = Group(name="unknown data", labels=labels)
            continue
        shown = set(Group.model_fields) & set(Dataset.model_fields)
        groups[key] = Group(
            **known.model_dump(include=shown),
            labels=labels,
            class_images=np.bincount(split.test.targets, minlength=len(labels)).tolist() if split else None,
        )
    return groups


def _labels(entries: Sequence[Entry]) -> list[str]:
    """The models' names, each told from others of that name by what differs in their paths."""
    labels = [entry.name for entry in entries]
    for name in set(labels):
        same = [index for index, entry in enumerate(entries) if entry.name == name]
        paths = [entries[index].item.folder.absolute().parts for index in same]
        if len(same) > 1:
            for index, part in zip(same, differing_parts(paths), strict=True):
                labels[index] = f"{name} ({part})"
    return labels


def differing_parts(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """What is left of each path without the folders that all begin and end with.

    At least one folder of each is left, and different paths are still different.
    """
    begin = _shared(paths)
    rests = [path[begin:] for path in paths]
    end = _shared([rest[::-1] for rest in rests])
    return ["/".join(rest[: len(rest) - end]) for rest in rests]


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """How many folders all begin with, not counting a path's last."""
    beginnings = zip(*(path[:-1] for path in paths), strict=False)
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, beginnings)))


def _model(entry: Entry, label: str, group: int) -> Model:
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
        "front": _front(entry),
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
        if evidence is None or evidence.engine_top1 is None
        else Claim(
            top1=evidence.engine_top1,
            images=evidence.originals or evidence.images,
            image_set=evidence.image_set,
        ),
        evidence=evidence,
        provenance=facts_of_package(item.folder, manifest),
        **common,
    )


def _front(entry: Entry) -> str | None:
    """What a network that was pruned to a budget has in common with others of its student."""
    item, card = entry.item, entry.choice.card
    promise = item.card.promise if isinstance(item, Checkpoint) else item.manifest.promise
    if promise is None:
        return None
    if card is not None and card.lineage:
        return card.lineage[-1].weights_sha256
    return entry.name.replace(f"-{promise.suffix}", "")  # where the engine's checkpoint is not here


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _machine(entries: Sequence[Entry], load: float) -> dict[str, str]:
    here = this_machine()
    machine = {
        "processor": here.cpu_name or here.cpu_architecture,
        "cores": str(cores()),
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


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _cautions(load: float) -> list[str]:
    if load <= _BUSY * cores():
        return []
    return [
        f"The machine was busy when this began (load {load:.1f} on {cores()} cores). Latencies were taken "
        "in turns, so that their order means something; the milliseconds themselves may be too high."
    ]
