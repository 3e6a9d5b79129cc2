"""Networks that TrimRT did not train: an ONNX file, or a torchvision or timm classifier by name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from builder.kit import LONGEST_NAME, Student
from builder.prepare.export import ExportError, export_onnx
from builder.prepare.import_onnx import RESIZE_RATIO, export_imported, import_onnx, read_preprocessing
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Subject
from models.datasets import DatasetError, DataSplit, open_dataset
from models.evaluation import count_macs, count_parameters, predict_logits
from models.networks import NetworkError, load_pretrained
from models.preprocessing import Preprocessing
from runtime.manifest import sha256_of

if TYPE_CHECKING:
    from torch import nn

PRETRAINED: Final = "pretrained"


def open_onnx(path: Path, options: PrepareOptions) -> Subject:
    """The classifier in an ONNX file.

    Raises:
        ExportError: not a classifier of images that TrimRT can take; the message says what to do.
        DatasetError: no data, or its classes are others.
    """
    imported = import_onnx(path, options.preprocess)
    data = _data(options)
    return Subject(
        path=path,
        student=Student(
            name=_name(path.stem),
            labels=_labels(options, imported.labels, imported.classes, data),
            preprocessing=imported.preprocessing,
            checkpoint_sha256=sha256_of(path),
            parameters=imported.parameters,
            macs=None,
        ),
        data=data,
        export=lambda master: export_imported(imported, master),
        reference=imported.logits,
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
    if options.preprocess is not None:
        spec = read_preprocessing(options.preprocess, spec.height, spec.width)
    network = network.eval()
    classes = int(predict_logits(network, _blank(spec), spec).shape[1])
    return Subject(
        path=Path(source),
        student=Student(
            name=_name(name),
            labels=_labels(options, labels, classes, data),
            preprocessing=spec,
            checkpoint_sha256=None if own else sha256_of(Path(options.weights)),
            parameters=count_parameters(network),
            macs=count_macs(network, spec.height, spec.width),
        ),
        data=data,
        export=lambda master: export_onnx(network, spec, master),
        reference=lambda pixels: predict_logits(network, pixels, spec).numpy(),
        network=network,
    )


def _from_torchvision(name: str, classes: int | None) -> tuple[nn.Module, Preprocessing, list[str] | None]:
    import torchvision

    try:
        weights: Any = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError as error:
        raise ExportError(f"torchvision has no model {name!r}") from error
    transforms = weights.transforms()
    spec = Preprocessing(
        resize=transforms.resize_size[0],
        height=transforms.crop_size[0],
        width=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
    if classes is None:
        return torchvision.models.get_model(name, weights=weights), spec, list(weights.meta["categories"])
    return torchvision.models.get_model(name, weights=None, num_classes=classes), spec, None


def _from_timm(name: str, classes: int | None) -> tuple[nn.Module, Preprocessing, list[str] | None]:
    try:
        timm: Any = importlib.import_module("timm")  # so that types do not depend on its being installed
    except ImportError as error:
        raise ExportError("timm is not installed: pip install 'trimrt[timm]'") from error
    try:
        network = timm.create_model(name, pretrained=classes is None, num_classes=classes)
    except RuntimeError as error:
        raise ExportError(f"timm: {error}") from error
    config = timm.data.resolve_model_data_config(network)
    _, height, width = config["input_size"]
    spec = Preprocessing(
        resize=max(round(max(height, width) / config.get("crop_pct", 1 / RESIZE_RATIO)), height, width),
        height=height,
        width=width,
        mean=config["mean"],
        std=config["std"],
    )
    return network, spec, None


def _data(options: PrepareOptions) -> DataSplit:
    if options.data is None:
        raise DatasetError(
            "a network from elsewhere needs --data: an ImageFolder directory whose training images "
            "calibrate INT8 and whose validation images judge the engines"
        )
    return open_dataset(options.data)


def _labels(options: PrepareOptions, told: list[str] | None, classes: int, data: DataSplit) -> list[str]:
    """The class labels, which must be the data's classes in the data's order."""
    labels = list(data.labels)
    if len(labels) != classes:
        raise DatasetError(
            f"the network has {classes} classes, {data.source} has {len(labels)}; name its data with --data"
        )
    if options.labels is not None:
        try:
            given = options.labels.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(f"{options.labels} cannot be read: {error}") from error
        told = [line.strip() for line in given if line.strip()]
        if len(told) != classes:
            raise ExportError(f"{options.labels} has {len(told)} labels, the network has {classes} classes")
    return told if told is not None and len(told) == classes else labels


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower())[:LONGEST_NAME].strip("-._") or "model"


def _blank(spec: Preprocessing) -> Any:
    import numpy as np

    return np.zeros((1, spec.height, spec.width, 3), np.uint8)
