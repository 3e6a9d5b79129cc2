"""Which label is which: a network's classes matched by name with the folders that the images are in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import ExportError
from models.naming import did_you_mean, nothing_at, shortened

_SHOWN = 5


class Labelling(NamedTuple):
    """The network's labels and the images' classes among them.

    Attributes:
        labels: one for each of the network's outputs.
        classes: int64, the output that stands for each folder of images, shape (folders,).
        source: where the labels come from; None: the folders.
    """

    labels: list[str]
    classes: NDArray[np.int64]
    source: str | None


def match_labels(
    told: Sequence[str] | None, source: str, folders: Sequence[str], classes: int, single: bool
) -> Labelling:
    """Match labels and folders by name, whatever their order.

    Args:
        told: the network's labels, in the order of its outputs; None: nobody tells, and it has the order of
            the folders.
        source: who tells.
        folders: of the images, sorted as text.
        classes: outputs of the network.
        single: the network has one score, for the second of two classes. Then one label may be told, the
            second one's.

    Raises:
        ExportError: the names are not of the same classes, or there are too many or too few.
    """
    if told is None:
        if len(folders) != classes:
            raise ExportError(
                f"the network has {classes} classes and the data has {len(folders)} folders; name the "
                "network's classes with --labels FILE (one a line, in the order of its outputs), or other "
                "data with --data"
            )
        return Labelling(list(folders), np.arange(classes), None)
    labels = list(told)
    if single and len(labels) == 1 and len(folders) == 2 and labels[0] in folders:
        labels.insert(0, next(folder for folder in folders if folder != labels[0]))
    if len(labels) != classes:
        raise ExportError(
            f"{source} has {len(labels)} labels, the network has {classes} classes: {shortened(labels)}"
        )
    if twice := sorted({label for label in labels if labels.count(label) > 1}) if classes < 10_000 else []:
        known = [label for label in twice if label in folders]
        if known:
            raise ExportError(f"{source} names {', '.join(known)} twice, so its folder could be either class")
    places = {label: place for place, label in reversed(list(enumerate(labels)))}
    if not set(folders) <= set(places):
        places |= _loosely(labels, folders)
    if unknown := [folder for folder in folders if folder not in places]:
        raise ExportError(_unknown(unknown, labels, source))
    return Labelling(labels, np.array([places[folder] for folder in folders], np.int64), source)


def read_labels(path: Path) -> list[str]:
    """The labels in a file: one a line, or JSON, a list or a mapping from numbers.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ExportError(f"--labels: {nothing_at(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".json":
        try:
            return labels_of_json(json.loads(text))
        except ValueError as error:
            raise ExportError(f"{path} holds no labels: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def labels_beside(folder: Path) -> tuple[list[str], str] | None:
    """The labels in Hugging Face's `config.json` in the model's folder, and where they were found."""
    path = folder / "config.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["id2label"]
        labels = labels_of_json(names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if labels == [f"LABEL_{place}" for place in range(len(labels))]:  # what transformers writes for none
        return None
    return labels, str(path)


def labels_of_json(value: object) -> list[str]:
    """Labels of a list, or of a mapping from numbers or to numbers.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, dict):
        if value and all(isinstance(number, int) for number in value.values()):
            value = {number: name for name, number in value.items()}
        numbers = sorted(value, key=int)
        if [int(number) for number in numbers] != list(range(len(numbers))):
            raise ValueError("its numbers do not run from 0 without gaps")
        value = [value[number] for number in numbers]
    if not isinstance(value, list) or not all(isinstance(label, str | int) for label in value):
        raise ValueError("it is neither a list of labels nor a mapping from numbers to them")
    return [str(label) for label in value]


def natural_order(folders: Sequence[str]) -> list[str]:
    """Names with numbers in the order that people count in: 2 before 10."""
    return sorted(
        folders, key=lambda name: [int(part) if part.isdecimal() else part for part in _parts(name)]
    )


def _parts(name: str) -> list[str]:
    # Text and numbers take turns, so that the same places are of the same type.
    return re.split(r"(\d+)", name)


def _loosely(labels: Sequence[str], folders: Sequence[str]) -> dict[str, int]:
    """Folders that are a label but for case, spaces and punctuation, where that is not ambiguous."""
    plain = [_plain(label) for label in labels]
    names = [_plain(folder) for folder in folders]
    return {
        folder: plain.index(name)
        for folder, name in zip(folders, names, strict=True)
        if name and plain.count(name) == 1 and names.count(name) == 1
    }


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _unknown(unknown: Sequence[str], labels: Sequence[str], source: str) -> str:
    shown = ", ".join(unknown[:_SHOWN]) + (f" and {len(unknown) - _SHOWN} more" * (len(unknown) > _SHOWN))
    return (
        f"the folders {shown}{did_you_mean(unknown[0], labels)} are no classes of the network, "
        f"whose labels are {shortened(labels)} ({source}). "
        "Rename the folders, or name the network's classes with --labels FILE, "
        "one a line in the order of its outputs"
    )
