"""Classifiers of torchvision and timm: with their library's own weights, or with a user's."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torchvision
from torch import nn

from builder.finding import WEIGHTS_SUFFIXES
from builder.kit import Student
from builder.prepare.export import ExportError, export_onnx
from builder.prepare.labels import labels_of_json
from builder.prepare.normalisations import (
    Resizing,
    Taken,
    read_preprocessing,
    timm_preprocessing,
    told_size,
)
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Subject
from builder.prepare.sources import find_labels, judge, open_data, package_name, require_data, tell_labels
from models.evaluation import count_macs, count_parameters, predict_logits
from models.networks import TIMM, NetworkError, architecture_of, architectures, create_network
from models.preprocessing import Preprocessing
from models.weights import WeightsFile, count_classes, load_weights, read_weights
from runtime.manifest import sha256_of

PRETRAINED: Final = "pretrained"


class _Loaded(NamedTuple):
    """A network with its weights.

    Attributes:
        network: on the CPU.
        architecture: its name.
        spec: how its library gives it images.
        labels: of its classes; None: nobody says.
        notes: for the user.
    """

    network: nn.Module
    architecture: str
    spec: Preprocessing
    labels: list[str] | None
    notes: tuple[str, ...] = ()


def open_named(source: str, options: PrepareOptions) -> Subject:
    """A classifier by its library's name for it: `torchvision:NAME` or `timm:NAME`.

    Raises:
        ExportError: no weights, or a preprocessing that is not its own.
        NetworkError: no such architecture, or weights that are not its own.
        DatasetError: no data, or its classes are others.
    """
    if options.weights is None:
        raise ExportError(f"{source} needs weights: --weights FILE, or --weights {PRETRAINED}")
    require_data(options)
    name = options.name or package_name(source.partition(":")[2])
    if options.weights == PRETRAINED:
        return _subject(Path(source), name, _library_weights(source), None, options)
    architecture = architecture_of(source)
    file = read_weights(Path(options.weights))
    return _subject(Path(source), name, _load(file, architecture), file.path, options)


def open_weights(path: Path, options: PrepareOptions) -> Subject:
    """The classifier whose weights are in a file, or in a folder of Hugging Face's.

    Raises:
        ExportError: a preprocessing that is not its own.
        NetworkError: the weights cannot be read, or are not those of the architecture, or nobody names it.
        DatasetError: no data, or its classes are others.
    """
    require_data(options)
    file = read_weights(path)
    loaded = _load(file, _architecture(file, options.architecture))
    # A folder of Hugging Face's has a name; the file in it has always the same.
    stem = path.name if path.is_dir() else path.name.removesuffix(".tar")
    for suffix in WEIGHTS_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return _subject(path, options.name or package_name(stem), loaded, file.path, options)


def _architecture(file: WeightsFile, asked: str | None) -> str:
    if asked is not None:
        return architecture_of(asked)
    told = file.architecture
    if told is None:
        if file.transformers is not None:
            raise NetworkError(
                f"{file.path} is of {file.transformers} of transformers. Export it: "
                f"optimum-cli export onnx --model {file.path.parent} onnx"
            )
        raise NetworkError(
            f"{file.path} does not say which network its weights are of: name it with --architecture, such "
            "as resnet18 (torchvision's) or timm:mobilenetv3_small_100"
        )
    try:
        return architecture_of(told if told in architectures() and not file.by_timm else f"{TIMM}{told}")
    except NetworkError as error:
        raise NetworkError(f"{file.path} is of {told!r}: {error}; name it with --architecture") from error


def _load(file: WeightsFile, architecture: str) -> _Loaded:
    """The network of that architecture, with the weights in `file` and as many classes as they have."""
    arguments = file.model_args if architecture.startswith(TIMM) else {}
    classes = count_classes(file, lambda count: create_network(architecture, count, arguments))
    network = create_network(architecture, classes or 2, arguments)
    found = load_weights(network, file, architecture)
    try:
        labels = labels_of_json(file.labels)
    except ValueError:
        labels = None
    note = f"weights: {found}; {architecture} with {classes} classes"
    return _Loaded(network, architecture, _own_preprocessing(network, architecture, file), labels, (note,))


def _own_preprocessing(network: nn.Module, architecture: str, file: WeightsFile) -> Preprocessing:
    """How the library gives images to the architecture, and what the file says of it."""
    if architecture.startswith(TIMM):
        timm: Any = importlib.import_module("timm")
        config = timm.data.resolve_data_config(dict(file.config), model=network)
        return Preprocessing.model_validate(timm_preprocessing(config))
    spec = _from_transforms(torchvision.models.get_model_weights(architecture).DEFAULT.transforms())
    own: Any = getattr(network, "image_size", spec.height)  # the weights may be for another size
    return spec if own == spec.height else _with_size(spec, own, own)


def _library_weights(source: str) -> _Loaded:
    """The network with the weights that its library downloads."""
    architecture = architecture_of(source)
    if not architecture.startswith(TIMM):
        weights: Any = torchvision.models.get_model_weights(architecture).DEFAULT
        network = torchvision.models.get_model(architecture, weights=weights)
        spec = _from_transforms(weights.transforms())
        return _Loaded(network, architecture, spec, list(weights.meta["categories"]))
    timm: Any = importlib.import_module("timm")
    try:
        network = timm.create_model(architecture.removeprefix(TIMM), pretrained=True)
    except RuntimeError as error:
        raise NetworkError(f"timm: {error}") from error
    config = timm.data.resolve_model_data_config(network)
    return _Loaded(network, architecture, Preprocessing.model_validate(timm_preprocessing(config)), None)


def _from_transforms(transforms: Any) -> Preprocessing:
    (resize,), (crop,) = transforms.resize_size, transforms.crop_size
    return Preprocessing(
        resize=resize,
        height=crop,
        width=crop,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )


def _with_size(spec: Preprocessing, height: int, width: int) -> Preprocessing:
    """`spec` for another input size, cut out of as large a part of the image."""
    resize = max(round(spec.resize * max(height, width) / max(spec.height, spec.width)), height, width)
    return spec.model_copy(update={"height": height, "width": width, "resize": resize})


def _preprocessing(loaded: _Loaded, options: PrepareOptions) -> Taken:
    """What the library says, as far as the options do not."""
    spec = loaded.spec
    if options.size is not None:
        spec = _with_size(spec, *options.size)
    resizing = Resizing(options.resize, options.interpolation)
    if options.preprocess is not None:
        told = told_size(options.preprocess, {}, Path()) or (spec.height, spec.width)
        taken = read_preprocessing(options.preprocess, resizing, *told)
    else:
        taken = Taken(_resized(spec, resizing), _library(loaded.architecture)[0])
    if taken.spec.channels != "RGB":
        raise ExportError(
            f"{loaded.architecture} takes RGB, so --preprocess cannot be for {taken.spec.channels}"
        )
    return taken


def _resized(spec: Preprocessing, resizing: Resizing) -> Preprocessing:
    fields = spec.model_dump()
    if resizing.fit is not None:
        del fields["resize"], fields["fit"]
        fields |= {"resize": int(resizing.fit)} if resizing.fit.isdecimal() else {"fit": resizing.fit}
    if resizing.interpolation is not None:
        fields["interpolation"] = resizing.interpolation
    try:
        return Preprocessing.model_validate(fields)
    except ValueError as error:
        raise ExportError(
            f"--resize {resizing.fit} is smaller than the input {spec.height}x{spec.width}"
        ) from error


class _TwoScores(nn.Module):
    """A network of one logit, which is the second of two classes' beside a logit of zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of shape (N, 2)."""
        score = self.network(images)
        return torch.cat([torch.zeros_like(score), score], dim=1)


def _library(architecture: str) -> tuple[str, str]:
    """The library that has the architecture, and its name there."""
    if architecture.startswith(TIMM):
        return "timm", architecture.removeprefix(TIMM)
    return "torchvision", architecture


def _subject(
    path: Path, name: str, loaded: _Loaded, weights: Path | None, options: PrepareOptions
) -> Subject:
    """Args: `weights` is the file they are from; None: the library's own."""
    network, taken = loaded.network.eval(), _preprocessing(loaded, options)
    spec = taken.spec
    activation = options.activation or "softmax"
    try:
        outputs = predict_logits(network, np.zeros((1, spec.height, spec.width, 3), np.uint8), spec)
    except Exception as error:  # networks refuse sizes in as many ways as there are architectures
        raise ExportError(
            f"{loaded.architecture} cannot take {spec.height}x{spec.width} images: {error}"
        ) from error
    single = outputs.shape[1] == 1
    if single:
        network = _TwoScores(network)
    data = open_data(options)
    source = ":".join(_library(loaded.architecture))
    labelling = find_labels(
        options, loaded.labels, str(weights or source), data, max(outputs.shape[1], 2), single
    )
    return Subject(
        path=path,
        student=Student(
            name=name,
            labels=labelling.labels,
            activation=activation,
            source=source if weights is None else f"{source} with {weights.resolve()}",
            preprocessing=spec,
            checkpoint_sha256=None if weights is None else sha256_of(weights),
            parameters=count_parameters(network),
            macs=count_macs(network, spec.height, spec.width),
        ),
        data=data,
        export=lambda master: export_onnx(network, spec, master, activation),
        reference=lambda pixels: predict_logits(network, pixels, spec).numpy(),
        network=network,
        classes=labelling.classes if data.labels else None,
        judge=judge(options, data, labelling.labels, lambda: iter(())),
        notes=(*loaded.notes, str(taken), tell_labels(labelling, data)),
    )
