"""How a network from elsewhere gets its images: said by name, or in a file of the library that trained it.

The files are read as their libraries read them: timm's `config.json`, Hugging Face's
`preprocessor_config.json`, Paddle's `inference.yml`, the metadata that Ultralytics writes into ONNX files,
and TrimRT's own form, the fields of `Preprocessing`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from builder.prepare.export import ExportError
from models.naming import did_you_mean
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocessing

METADATA_KEY: Final = "preprocessing"
NEIGHBOURS: Final = ("preprocessor_config.json", "config.json", "inference.yml")  # beside the ONNX file

Channels = Literal["RGB", "BGR", "L"]


class Normalisation(NamedTuple):
    """Mean and standard deviation of pixels scaled to 0..1, in the order of `channels`."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: Channels = "RGB"


NORMALISATIONS: Final[Mapping[str, Normalisation]] = {
    "imagenet": Normalisation(IMAGENET_MEAN, IMAGENET_STD),
    "0..1": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "-1..1": Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0..255": Normalisation((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "caffe": Normalisation(
        (103.939 / 255, 116.779 / 255, 123.68 / 255), (1 / 255, 1 / 255, 1 / 255), "BGR"
    ),  # of Caffe, and of Keras' ResNet, VGG and DenseNet
}
RESIZE_RATIO: Final = 256 / 224  # of the shorter side to the crop, as ImageNet classifiers are evaluated
_CROPPED_FROM: Final = 96  # pixels; smaller networks see images as they are
_PILLOW_FILTERS: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_TIMM_FITS: Final = {"center": "crop", "squash": "squash", "border": "letterbox"}


class Resizing(NamedTuple):
    """What the user says about how images get their size; None: what a file or the usual says.

    Attributes:
        fit: a length of the shorter side, or `squash`, `letterbox`, `none`.
        interpolation: of resized images.
    """

    fit: str | None = None
    interpolation: Interpolation | None = None


class Taken(NamedTuple):
    """A preprocessing, and where it was found."""

    spec: Preprocessing
    source: str

    def __str__(self) -> str:
        spec = self.spec
        size = f"{spec.height}x{spec.width}"
        squashed = "{}x{}".format(*spec.squashed)
        how = {
            "crop": f"the shorter side becomes {spec.resize}, then the middle {size}",
            "squash": f"both sides are resized, to {squashed}",
            "letterbox": f"all of it fits into {size}, the rest is {spec.fill}",
            "none": f"the middle {size}, not resized",
        }[spec.fit]
        if spec.fit == "squash" and squashed != size:
            how += f", then the middle {size}"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (spec.mean, spec.std))
        kind = "" if spec.interpolation == "auto" else f" ({spec.interpolation})"
        return f"images: {how}{kind}; {spec.channels}, mean {mean}, std {std} of 0..1 ({self.source})"


def find_preprocessing(
    asked: str | None,
    resizing: Resizing,
    metadata: Mapping[str, str],
    folder: Path,
    size: tuple[int, int],
    channels: Channels,
) -> Taken | None:
    """What the options say, else the model's metadata, else a file beside it.

    Args:
        asked: a name of `NORMALISATIONS`, or a file.
        resizing: how images get their size, as far as the user says so.
        metadata: of the ONNX file.
        folder: that the ONNX file is in.
        size: height and width of the network's input.
        channels: `L` for a network of one channel.

    Returns:
        None: nothing says it.

    Raises:
        ExportError: what was asked for is neither a name nor a file of a known form.
    """
    found = _asked(asked, size) if asked is not None else _told(metadata, folder, size)
    if found is None:
        return None
    fields, source = found
    if channels == "L":
        fields = {**fields, "channels": "L"}
    if (fit := resizing.fit) is not None:
        fields = {name: value for name, value in fields.items() if name not in ("resize", "fit")}
        fields |= {"resize": int(fit)} if fit.isdecimal() else {"fit": fit}
    if resizing.interpolation is not None:
        fields = {**fields, "interpolation": resizing.interpolation}
    if fields.get("interpolation", "auto") != "auto":  # said to be exact
        fields = {"scaled_decoding": False, **fields}
    try:
        return Taken(_parse(fields, size), source)
    except ValueError as error:
        raise ExportError(f"the preprocessing of {source} is not valid: {_first_line(error)}") from error


def told_size(asked: str | None, metadata: Mapping[str, str], folder: Path) -> tuple[int, int] | None:
    """Height and width of the network's input, as its metadata or a file of its preprocessing has them."""
    if "imgsz" in metadata:  # Ultralytics
        try:
            height, width = json.loads(metadata["imgsz"])
            return int(height), int(width)
        except (ValueError, TypeError):
            pass
    paths = [folder / name for name in NEIGHBOURS] if asked is None else [Path(asked)]
    for path in paths:
        if asked not in NORMALISATIONS and path.is_file():
            try:
                fields = _read_file(path, (1, 1), ours=asked is not None) or {}
            except (OSError, ValueError):
                continue  # `find_preprocessing` says what is wrong with it
            if isinstance(fields.get("height"), int) and isinstance(fields.get("width"), int):
                return fields["height"], fields["width"]
    return None


def read_preprocessing(asked: str, resizing: Resizing, height: int, width: int) -> Taken:
    """What the options say, for a network that takes images of that size.

    Raises:
        ExportError: it is neither a name of `NORMALISATIONS` nor a file of a known form.
    """
    found = find_preprocessing(asked, resizing, {}, Path(), (height, width), "RGB")
    assert found is not None, "something was asked for"
    return found


def _asked(asked: str, size: tuple[int, int]) -> tuple[dict[str, Any], str]:
    if asked in NORMALISATIONS:
        return NORMALISATIONS[asked]._asdict() | _usual_fit(size), f"--preprocess {asked}"
    names = ", ".join(NORMALISATIONS)
    try:
        fields = _read_file(Path(asked), size, ours=True)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"--preprocess {asked}{did_you_mean(asked, NORMALISATIONS)} is neither one of {names} nor a file "
            f"of a preprocessing: {_first_line(error)}"
        ) from error
    if fields is None:
        raise ExportError(f"--preprocess {asked} describes no preprocessing; see docs/your-model.md")
    return fields, asked


def _told(
    metadata: Mapping[str, str], folder: Path, size: tuple[int, int]
) -> tuple[dict[str, Any], str] | None:
    if METADATA_KEY in metadata:
        try:
            fields = json.loads(metadata[METADATA_KEY])
        except ValueError as error:
            raise ExportError(f"the file's metadata describe no preprocessing: {error}") from error
        return _understand(fields, size, ours=True) or fields, "the file's metadata"
    if metadata.get("task") == "classify":  # Ultralytics
        return NORMALISATIONS["0..1"]._asdict() | {"resize": max(size), "interpolation": "bilinear"}, (
            "the file's metadata, by Ultralytics"
        )
    for path in (folder / name for name in NEIGHBOURS):
        try:
            fields = _read_file(path, size) if path.is_file() else None
        except (OSError, ValueError):
            continue  # not asked for, so it may be anything
        if fields is not None:
            return fields, str(path)
    return None


def _usual_fit(size: tuple[int, int]) -> dict[str, Any]:
    """How a network of that input size usually gets its images, where nothing says so."""
    height, width = size
    if height != width:
        return {"fit": "squash"}
    return {"resize": height if height < _CROPPED_FROM else round(height * RESIZE_RATIO)}


def _read_file(path: Path, size: tuple[int, int], *, ours: bool = False) -> dict[str, Any] | None:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".yml", ".yaml"):
        import yaml

        try:
            return _understand(yaml.safe_load(text), size, ours=ours)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    return _understand(json.loads(text), size, ours=ours)


def _understand(found: Any, size: tuple[int, int], *, ours: bool) -> dict[str, Any] | None:
    """The fields of `Preprocessing` that a file of any known form means; None: it has no such form.

    TrimRT's own form has no mark of its own, so it is one only where `ours` says that it is meant.
    """
    if not isinstance(found, dict):
        raise ValueError("it is no mapping of names to values")  # of a file, not of Python
    if "image_processor_type" in found or "image_mean" in found or "do_normalize" in found:
        return _from_hugging_face(found, size)
    timm = found.get("pretrained_cfg", found)
    if isinstance(timm, dict) and "input_size" in timm:
        return timm_preprocessing(timm)
    if "PreProcess" in found:
        return _from_paddle(found["PreProcess"])
    if "architectures" in found or "model_type" in found:  # Hugging Face's other config.json
        return None
    return _own(found) if ours else None


def _own(found: dict[str, Any]) -> dict[str, Any]:
    fields = dict(found)
    scale = fields.pop("range", None)
    for name in ("mean", "std"):
        value = fields.get(name)
        if isinstance(value, int | float):
            value = [value] * 3
        elif isinstance(value, list) and len(value) == 1:
            value = value * 3
        if value is not None:
            fields[name] = [each / scale for each in value] if scale else value
    mean = fields.get("mean") or [0]
    if max(mean) > 2:  # an average of 0..1 is at most 1
        raise ValueError(
            f'mean {mean} is of pixels from 0 to 255; add "range": 255, or divide mean and std by 255'
        )
    return fields


def _from_hugging_face(found: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """As `transformers.BaseImageProcessor` and its classifiers' subclasses use these fields."""
    fields: dict[str, Any] = {
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "interpolation": _PILLOW_FILTERS.get(found.get("resample", 2), "bilinear"),
    }
    factor = found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0
    if found.get("do_normalize", True):
        fields["mean"] = _triple(found.get("image_mean", 0.5))
        fields["std"] = _triple(found.get("image_std", 0.5))
    # (pixel * factor - mean) / std, said of pixels of 0..1
    fields["mean"] = tuple(value / (255 * factor) for value in fields["mean"])
    fields["std"] = tuple(value / (255 * factor) for value in fields["std"])
    if found.get("do_flip_channel_order"):
        fields["channels"] = "BGR"
    resized, cropped = found.get("size"), found.get("crop_size")
    if isinstance(cropped, int):
        cropped = {"height": cropped, "width": cropped}
    if not found.get("do_resize", True):
        fit: dict[str, Any] = {"fit": "none"}
    elif isinstance(resized, dict) and "height" in resized:
        fit = {"height": resized["height"], "width": resized["width"], "fit": "squash"}
        if found.get("do_center_crop") and cropped:
            if cropped["height"] * resized["width"] != cropped["width"] * resized["height"]:
                raise ValueError(
                    f"it squashes images to {resized} and then crops {cropped}, of another shape, which is "
                    "not offered"
                )
            fit["resize"] = max(resized["height"], resized["width"])
    else:
        shorter = resized.get("shortest_edge") if isinstance(resized, dict) else resized
        shorter = shorter or max(size)
        if "crop_pct" in found and not found.get("do_center_crop"):  # ConvNeXt
            fit = {"height": shorter, "width": shorter}
            whole = shorter >= 384  # as `ConvNextImageProcessor.resize` has it
            fit |= {"fit": "squash"} if whole else {"resize": int(shorter / (found["crop_pct"] or 224 / 256))}
        elif isinstance(resized, int) and not found.get("do_center_crop"):
            fit = {"fit": "squash", "height": shorter, "width": shorter}
        else:
            fit = {"resize": shorter}
    if found.get("do_center_crop") and cropped:
        fit |= {"height": cropped["height"], "width": cropped["width"]}
    return fields | fit


def timm_preprocessing(found: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing`, of those that `timm.data.create_transform` uses."""
    _, height, width = found["input_size"]
    mode = _TIMM_FITS.get(found.get("crop_mode") or "center", "crop")
    fields: dict[str, Any] = {
        "height": height,
        "width": width,
        "mean": _triple(found.get("mean", IMAGENET_MEAN)),
        "std": _triple(found.get("std", IMAGENET_STD)),
    }
    interpolation = found.get("interpolation") or "bilinear"
    if interpolation in _PILLOW_FILTERS.values():
        fields["interpolation"] = interpolation
    crop = found.get("crop_pct") or 0.875
    if mode == "crop":
        return fields | {"resize": max(int(max(height, width) / crop), height, width)}
    return fields | {"fit": mode}


def _from_paddle(found: Any) -> dict[str, Any]:
    """As PaddleClas' `transform_ops` do one after another."""
    operations: dict[str, Any] = {}
    for step in found.get("transform_ops", found) if isinstance(found, dict) else found:
        operations |= step if isinstance(step, dict) else {step: {}}
    resize, crop = operations.get("ResizeImage") or {}, operations.get("CropImage") or {}
    normalise = operations.get("NormalizeImage") or {}
    scale = normalise.get("scale", 1 / 255)
    scale = _number(scale) if isinstance(scale, str) else float(scale)
    fields: dict[str, Any] = {
        "mean": tuple(value / (255 * scale) for value in _triple(normalise.get("mean", IMAGENET_MEAN))),
        "std": tuple(value / (255 * scale) for value in _triple(normalise.get("std", IMAGENET_STD))),
    }
    size = crop.get("size", resize.get("size"))
    if size is not None:
        width, height = (size, size) if isinstance(size, int) else size
        fields |= {"height": height, "width": width}
    if "resize_short" in resize:
        return fields | {"resize": resize["resize_short"]}
    if crop and "size" in resize:
        whole = resize["size"]
        fields["resize"] = whole if isinstance(whole, int) else max(whole)
    return fields | {"fit": "squash"}


def _number(text: str) -> float:
    """A number or a fraction such as `1.0/255.0`."""
    top, _, bottom = text.partition("/")
    return float(ast.literal_eval(top.strip())) / float(ast.literal_eval(bottom.strip() or "1"))


def _triple(value: float | Sequence[float]) -> tuple[float, float, float]:
    values = [float(value)] if isinstance(value, int | float) else [float(each) for each in value]
    if len(values) == 1:
        values *= 3
    red, green, blue = values
    return red, green, blue


def _parse(fields: dict[str, Any], size: tuple[int, int]) -> Preprocessing:
    height, width = size
    told = fields.get("height", height), fields.get("width", width)
    if told != size:
        raise ValueError(f"it is for images of {told[0]}x{told[1]}, the network takes {height}x{width}")
    return Preprocessing.model_validate({"height": height, "width": width, **fields})


def _first_line(error: Exception) -> str:
    """What is wrong, without pydantic's headings."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[1:3]) if len(lines) > 2 else lines[0]
