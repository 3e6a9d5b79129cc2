"""Networks that TrimRT did not train: an ONNX file, or a torchvision or timm classifier by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.kit import LONGEST_NAME, Student
from builder.prepare.export import ExportError, export_onnx
from builder.prepare.import_onnx import export_imported, import_onnx
from builder.prepare.labels import Labelling, labels_beside, match_labels, read_labels
from builder.prepare.normalisations import (
    NORMALISATIONS,
    Resizing,
    Taken,
    read_preprocessing,
    timm_preprocessing,
    told_size,
)
from builder.prepare.options import PrepareOptions
from builder.prepare.plausibility import Alternative, require_plausible
from builder.prepare.preparation import Subject
from builder.prepare.unlabelled import has_no_classes, open_unlabelled
from models.datasets import DatasetError, DataSplit, ImageSet, open_dataset
from models.evaluation import count_macs, count_parameters, predict_logits
from models.naming import did_you_mean, shortened
from models.networks import NetworkError, architectures, load_pretrained
from models.preprocessing import Pixels, Preprocessing
from runtime.manifest import sha256_of

if TYPE_CHECKING:
    from torch import nn

PRETRAINED: Final = "pretrained"
_FEW: Final = 48  # images to look at a network's outputs with


def open_onnx(path: Path, options: PrepareOptions) -> Subject:
    """The classifier in an ONNX file.

    Raises:
        ExportError: not a classifier of images that TrimRT can take; the message says what to do.
        DatasetError: no data, or its classes are others.
    """
    opened: list[DataSplit] = []

    def sample(spec: Preprocessing) -> Pixels:
        opened.append(_data(options))  # only now: no data would mend a fault of the file
        return _some_of(opened[0].train).load_pixels(spec, progress=False)

    imported = import_onnx(path, options, sample)
    (data,) = opened
    labelling = _labels(options, imported.labels, str(path), data, imported.classes, imported.single)

    def alternatives() -> Iterator[Alternative]:
        return _alternatives(path, options, data.validation, labelling.classes)

    return Subject(
        path=path,
        student=Student(
            name=options.name or _name(path.stem),
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
        judge=_judge(options, data, labelling.labels, alternatives),
        notes=(*imported.notes, _told(labelling, data)),
    )


def open_named(source: str, options: PrepareOptions) -> Subject:
    """A classifier by its library's name for it: `torchvision:NAME` or `timm:NAME`.

    Raises:
        ExportError: no such model, weights that are not its own, or no preprocessing.
        DatasetError: no data, or its classes are others.
    """
    library, _, name = source.partition(":")
    if options.weights is None:
        raise ExportError(f"{source} needs weights: --weights FILE (a state dict), or --weights {PRETRAINED}")
    _require_known(library, name)
    data = _data(options)
    create = _from_timm if library == "timm" else _from_torchvision
    own = options.weights == PRETRAINED
    network, spec, labels = create(name, None if own else len(data.labels))
    if not own:
        try:
            missing = load_pretrained(network, Path(options.weights))
        except NetworkError as error:
            raise ExportError(str(error)) from error
        if missing:
            raise ExportError(
                f"{options.weights} has no {', '.join(missing)} of the shape that {source} has with "
                f"{len(data.labels)} classes, as many as {data.source}"
            )
        labels = None
    taken = Taken(spec, library)
    if options.preprocess is not None:
        taken = read_preprocessing(
            options.preprocess,
            Resizing(options.resize, options.interpolation),
            *(told_size(options.preprocess, {}, Path()) or (spec.height, spec.width)),
        )
        spec = taken.spec
    if spec.channels != "RGB":
        raise ExportError(f"{source} takes RGB, so --preprocess cannot be for {spec.channels}")
    activation = options.activation or "softmax"
    network = network.eval()
    classes = int(predict_logits(network, _blank(spec), spec).shape[1])
    labelling = _labels(options, labels, source, data, classes, single=False)
    return Subject(
        path=Path(source),
        student=Student(
            name=options.name or _name(name),
            labels=labelling.labels,
            activation=activation,
            source=source if own else f"{source} with {Path(options.weights).resolve()}",
            preprocessing=spec,
            checkpoint_sha256=None if own else sha256_of(Path(options.weights)),
            parameters=count_parameters(network),
            macs=count_macs(network, spec.height, spec.width),
        ),
        data=data,
        export=lambda master: export_onnx(network, spec, master, activation),
        reference=lambda pixels: predict_logits(network, pixels, spec).numpy(),
        network=network,
        classes=labelling.classes if data.labels else None,
        judge=_judge(options, data, labelling.labels, lambda: iter(())),
        notes=(str(taken), _told(labelling, data)),
    )


def _require_known(library: str, name: str) -> None:
    known = architectures() if library == "torchvision" else _timm().list_models()
    # timm's names may go on with the name of the weights, or begin with the place that they come from.
    if ":" not in name and name.partition(".")[0] not in known:
        raise ExportError(f"{library} has no model {name!r}{did_you_mean(name, known)}")


def _timm() -> Any:
    try:
        return importlib.import_module("timm")  # so that types do not depend on its being installed
    except ImportError as error:
        raise ExportError("timm is not installed: pip install 'trimrt[timm]'") from error


def _from_torchvision(name: str, classes: int | None) -> tuple[nn.Module, Preprocessing, list[str] | None]:
    import torchvision

    weights: Any = torchvision.models.get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    spec = Preprocessing(
        resize=transforms.resize_size[0],
        height=transforms.crop_size[0],
        width=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
    if classes is None:
        return torchvision.models.get_model(name, weights=weights), spec, list(weights.meta["categories"])
    return torchvision.models.get_model(name, weights=None, num_classes=classes), spec, None


def _from_timm(name: str, classes: int | None) -> tuple[nn.Module, Preprocessing, list[str] | None]:
    timm = _timm()
    try:
        network = timm.create_model(name, pretrained=classes is None, num_classes=classes)
    except RuntimeError as error:
        raise ExportError(f"timm: {error}") from error
    config = timm.data.resolve_model_data_config(network)
    spec = Preprocessing.model_validate(timm_preprocessing(config))
    return network, spec, None


def _data(options: PrepareOptions) -> DataSplit:
    if options.data is None:
        raise DatasetError(
            "a network from elsewhere needs --data: an ImageFolder directory whose training images "
            "calibrate INT8 and whose validation images judge the engines"
        )
    if options.unlabelled or has_no_classes(options.data):
        return open_unlabelled(options.data, options.on_damaged)
    return open_dataset(options.data, on_damaged=options.on_damaged)


def _labels(
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


def _told(labelling: Labelling, data: DataSplit) -> str:
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


def _judge(
    options: PrepareOptions,
    data: DataSplit,
    labels: Sequence[str],
    alternatives: Callable[[], Iterator[Alternative]],
) -> Callable[[NDArray[np.float32], NDArray[np.int64]], None] | None:
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


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower())[:LONGEST_NAME].strip("-._") or "model"


def _blank(spec: Preprocessing) -> Any:
    return np.zeros((1, spec.height, spec.width, 3), np.uint8)
