"""Networks that TrimRT did not train: ONNX files, and the data and labels of any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from builder.kit import LONGEST_NAME, Student
from builder.prepare.export import ExportError
from builder.prepare.heads import check_measures_nothing
from builder.prepare.import_onnx import export_imported, import_onnx
from builder.prepare.labels import Labelling, labels_beside, match_labels, read_labels
from builder.prepare.normalisations import NORMALISATIONS
from builder.prepare.options import PrepareOptions
from builder.prepare.plausibility import Alternative, require_plausible
from builder.prepare.preparation import Subject
from builder.prepare.unlabelled import JUDGING_SHARE, has_no_classes, open_unlabelled
from models.datasets import VALIDATION_SHARE, DatasetError, DataSplit, ImageSet, open_dataset
from models.naming import shortened
from models.preprocessing import Pixels, Preprocessing
from runtime.manifest import sha256_of

_FEW: Final = 48  # images to look at a network's outputs with


def open_onnx(path: Path, options: PrepareOptions) -> Subject:
    """The classifier in an ONNX file.

    Raises:
        ExportError: not a classifier of images that TrimRT can take; the message says what to do.
        DatasetError: no data, or its classes are others.
    """
    opened: list[tuple[DataSplit, Pixels]] = []

    def sample(spec: Preprocessing) -> Pixels:
        data = open_data(options)  # only now: no data would mend a fault of the file
        pixels = _some_of(data.train).load_pixels(spec, progress=False)
        opened.append((data, pixels))
        return pixels

    imported = import_onnx(path, options, sample)
    ((data, pixels),) = opened
    if imported.single and options.activation is None and not data.labels:
        check_measures_nothing(imported.logits(pixels)[:, 1])
    labelling = find_labels(options, imported.labels, str(path), data, imported.classes, imported.single)

    def alternatives() -> Iterator[Alternative]:
        return _alternatives(path, options, data.validation, labelling.classes)

    return Subject(
        path=path,
        student=Student(
            name=options.name or package_name(path.stem),
            labels=labelling.labels,
            activation=imported.activation,
            source=str(path.resolve()),
            preprocessing=imported.preprocessing,
            checkpoint_sha256=sha256_of(path),
            parameters=imported.parameters,
            macs=imported.macs,
        ),
        data=data,
        export=lambda master: export_imported(imported, master),
        reference=imported.logits,
        classes=labelling.classes if data.labels else None,
        judge=judge(options, data, labelling.labels, alternatives),
        notes=(*imported.notes, tell_labels(labelling, data)),
    )


def require_data(options: PrepareOptions) -> str:
    """The data set that is named.

    Raises:
        DatasetError: none is.
    """
    if options.data is None:
        raise DatasetError(
            "a network from elsewhere needs --data: an ImageFolder directory whose training images "
            "calibrate INT8 and whose validation images judge the engines"
        )
    return options.data


def open_data(options: PrepareOptions) -> DataSplit:
    """The data set that is named, whose folders may be no classes.

    Nothing was trained on it here, so half of what is not for testing judges; fine-tuning needs more of it.

    Raises:
        DatasetError: none is, or it cannot be used.
    """
    source = require_data(options)
    if options.unlabelled or has_no_classes(source):
        return open_unlabelled(source, options.on_damaged)
    share = VALIDATION_SHARE if options.qat else JUDGING_SHARE
    return open_dataset(source, on_damaged=options.on_damaged, validation_share=share)


def find_labels(
    options: PrepareOptions, told: list[str] | None, where: str, data: DataSplit, classes: int, single: bool
) -> Labelling:
    """The class labels: those of a file, of the model, or of the file beside it, else the data's folders."""
    source = f"the metadata of {where}"
    if options.labels is not None:
        told, source = read_labels(options.labels), str(options.labels)
    elif told is None and (beside := labels_beside(Path(where).parent)) is not None:
        told, source = beside
    if not data.labels:
        labels = list(told) if told is not None else [str(place) for place in range(classes)]
        if len(labels) != classes:
            raise ExportError(f"{source} has {len(labels)} labels, the network has {classes} classes")
        return Labelling(labels, np.arange(0), source if told is not None else "numbers, for want of names")
    return match_labels(told, source, data.labels, classes, single)


def tell_labels(labelling: Labelling, data: DataSplit) -> str:
    """Where the labels come from, for the user."""
    if not data.labels:
        return (
            f"the images have no labels: engines are judged by agreement with FP32 alone; "
            f"labels: {shortened(labelling.labels)} ({labelling.source})"
        )
    if labelling.source is None:
        return f"labels: the folders of {data.source}, in their order: {shortened(labelling.labels)}"
    others = len(labelling.labels) - len(labelling.classes)
    without = f"; {others} of them have no images" if others else ""
    return f"labels: {shortened(labelling.labels)} ({labelling.source}{without})"


def judge(
    options: PrepareOptions,
    data: DataSplit,
    labels: Sequence[str],
    alternatives: Callable[[], Iterator[Alternative]],
) -> Callable[[NDArray[np.float32], NDArray[np.int64]], None] | None:
    """What `Subject.judge` is, as far as there is something to judge by."""
    if options.allow_low_accuracy or not data.labels:
        return None
    return lambda logits, targets: require_plausible(logits, targets, labels, alternatives)


def _alternatives(
    path: Path, options: PrepareOptions, images: ImageSet, classes: NDArray[np.int64]
) -> Iterator[Alternative]:
    """The accuracy with every other named normalisation, on some of the images."""
    some = _some_of(images)
    for name in NORMALISATIONS:
        if name == options.preprocess:
            continue
        try:
            other = import_onnx(path, options.model_copy(update={"preprocess": name}))
        except ExportError:
            continue
        pixels = some.load_pixels(other.preprocessing, progress=False)
        right = other.logits(pixels).argmax(axis=1) == classes[some.targets]
        yield Alternative(f"--preprocess {name}", float(np.mean(right)))


def _some_of(images: ImageSet) -> ImageSet:
    """A few images, of as many classes as possible."""
    places = np.random.default_rng(0).permutation(len(images))
    seen: dict[int, int] = {}
    # The first of every class, then the second of every class, and so on.
    turns = []
    for place in places.tolist():
        target = int(images.targets[place])
        turns.append((seen.get(target, 0), place))
        seen[target] = seen.get(target, 0) + 1
    chosen = [place for _, place in sorted(turns)[:_FEW]]
    return images.subset(np.array(chosen, np.int64), f"{images.name}-sample")


def package_name(text: str) -> str:
    """`text` as names of packages are written."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower())[:LONGEST_NAME].strip("-._") or "model"
