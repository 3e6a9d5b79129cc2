"""An ONNX classifier from anywhere, brought to the form that TrimRT's own exports have.

It must take normalised float NCHW images and give one score for each class. What is adapted: a
batch size fixed at export becomes dynamic, a softmax at the end is taken off (TrimRT adds its own,
and compares logits), and the opset becomes the newest that TensorRT 10.3 reads.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import (
    OPSET,
    ExportError,
    add_pixels_input,
    random_pixels,
    require_same,
    run_onnx,
)
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Pixels, Preprocessing

if TYPE_CHECKING:
    import onnx

METADATA_KEY: Final = "preprocessing"
LABEL_KEYS: Final = ("labels", "names", "classes")

# name: mean and std of pixels scaled to 0..1
NORMALISATIONS: Final = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "0..1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "-1..1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0..255": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
RESIZE_RATIO: Final = 256 / 224  # of the shorter side to the crop, as ImageNet classifiers are evaluated


@dataclass(frozen=True)
class ImportedModel:
    """A classifier read from an ONNX file.

    Attributes:
        model: normalised float NCHW images of any batch size in, logits out.
        preprocessing: how an image becomes its input.
        labels: of its classes, if the file tells.
        classes: how many there are.
        parameters: numbers in its weights.
    """

    model: onnx.ModelProto
    preprocessing: Preprocessing
    labels: list[str] | None
    classes: int
    parameters: int

    def logits(self, pixels: Pixels) -> NDArray[np.float32]:
        """What the model makes of uint8 NHWC `pixels`, normalised here; shape (N, classes)."""
        spec = self.preprocessing
        mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
        images = (pixels.astype(np.float32) / 255 - mean) / std
        return run_onnx(self.model, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def import_onnx(path: Path, preprocess: str | None) -> ImportedModel:
    """Read and adapt the classifier in an ONNX file.

    Args:
        path: the file.
        preprocess: a name of `NORMALISATIONS`, or a JSON file of `Preprocessing`; None takes what the
            file's own metadata says under `preprocessing`.

    Raises:
        ExportError: not ONNX, not a classifier of images, or its preprocessing is unknown.
    """
    import onnx

    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise types of their own
        raise ExportError(f"{path} is not a valid ONNX model: {str(error).splitlines()[0]}") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    height, width = _free_batch(path, model)
    _take_softmax_off(model)
    model = _with_opset(path, model)
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            f"{path} does not work for batches of any size: {error}. {_EXPORT_ADVICE}"
        ) from error
    imported = ImportedModel(
        model=model,
        preprocessing=read_preprocessing(preprocess, height, width)
        if preprocess is not None
        else _own_preprocessing(path, metadata, height, width),
        labels=_labels(metadata),
        classes=_classes(path, model),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.dims),
    )
    _check_batches(path, imported)
    return imported


def export_imported(imported: ImportedModel, path: Path) -> float:
    """Write the master graph: the model with pixels for input; returns the largest logit difference.

    Raises:
        ExportError: the master graph's output differs from the model's.
    """
    import onnx

    model = add_pixels_input(imported.model, imported.preprocessing)
    onnx.save(model, str(path))
    pixels = random_pixels(imported.preprocessing, 3)
    return require_same(path, pixels, imported.logits(pixels))


_EXPORT_ADVICE: Final = "Export it with a dynamic batch size"


def _free_batch(path: Path, model: onnx.ModelProto) -> tuple[int, int]:
    """Make the batch size dynamic; returns height and width of the images."""
    from onnx import TensorProto

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        names = [value.name for value in inputs], [value.name for value in model.graph.output]
        raise ExportError(
            f"{path} has the inputs {names[0]} and outputs {names[1]}; a classifier has one of each"
        )
    tensor = inputs[0].type.tensor_type
    sizes = [dimension.dim_value for dimension in tensor.shape.dim]
    if tensor.elem_type != TensorProto.FLOAT or len(sizes) != 4:
        raise ExportError(f"{path} takes no batch of float images of shape (N, 3, H, W)")
    _, channels, height, width = sizes
    if channels != 3 and width == 3:
        raise ExportError(f"{path} takes NHWC images; export it for NCHW, (N, 3, H, W)")
    if channels != 3 or height < 1 or width < 1:
        raise ExportError(f"{path} takes images of shape {sizes[1:]}; they must be (3, H, W), H and W fixed")
    if sizes[0]:
        _free_reshapes(model, sizes[0])
    for value in (inputs[0], model.graph.output[0]):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]  # shapes with the old batch size
    return height, width


def _free_reshapes(model: onnx.ModelProto, batch: int) -> None:
    """Let reshapes that name the batch size of the export keep whatever they get; `_check_batches` judges."""
    from onnx import numpy_helper

    targets = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    for tensor in model.graph.initializer:
        if tensor.name in targets:
            shape = numpy_helper.to_array(tensor).copy()
            if len(shape) > 1 and shape[0] == batch:
                shape[0] = 0 if -1 in shape else -1  # as in the input; whatever is left over
                tensor.CopyFrom(numpy_helper.from_array(shape, tensor.name))


def _take_softmax_off(model: onnx.ModelProto) -> None:
    """Make the logits the output, where probabilities are."""
    graph = model.graph
    last = next((node for node in graph.node if graph.output[0].name in node.output), None)
    if last is not None and last.op_type == "Softmax":
        graph.node.remove(last)
        graph.output[0].name = last.input[0]


def _with_opset(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import version_converter

    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if version == OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises bare RuntimeErrors and others
        raise ExportError(
            f"{path} is of opset {version} and cannot be converted to {OPSET} "
            f"({str(error).splitlines()[0]}); export it with opset {OPSET}"
        ) from error


def read_preprocessing(asked: str, height: int, width: int) -> Preprocessing:
    """What `--preprocess` says, for images of that size.

    Args:
        asked: a name of `NORMALISATIONS`, or a JSON file with fields of `Preprocessing`.
        height: of the network's input.
        width: of the network's input.

    Raises:
        ExportError: it is neither.
    """
    if asked in NORMALISATIONS:
        mean, std = NORMALISATIONS[asked]
        resize = round(max(height, width) * RESIZE_RATIO)
        return Preprocessing(resize=resize, height=height, width=width, mean=mean, std=std)
    try:
        return _parse_preprocessing(Path(asked).read_text(encoding="utf-8"), height, width)
    except (OSError, ValueError) as error:
        names = ", ".join(NORMALISATIONS)
        raise ExportError(
            f"--preprocess {asked} is neither one of {names} nor a JSON file of a preprocessing: {error}"
        ) from error


def _own_preprocessing(path: Path, metadata: dict[str, str], height: int, width: int) -> Preprocessing:
    """What the file's metadata says."""
    if METADATA_KEY not in metadata:
        raise ExportError(
            f"{path} does not say how its images are normalised; say so with --preprocess: "
            f"{', '.join(NORMALISATIONS)}, or a JSON file such as "
            '{"resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'
        )
    try:
        return _parse_preprocessing(metadata[METADATA_KEY], height, width)
    except ValueError as error:
        raise ExportError(f"{path}'s metadata describe no preprocessing: {error}") from error


def _parse_preprocessing(text: str, height: int, width: int) -> Preprocessing:
    fields: dict[str, Any] = json.loads(text)
    return Preprocessing.model_validate({"height": height, "width": width, **fields})


def _labels(metadata: dict[str, str]) -> list[str] | None:
    """Class labels from the file's metadata, as JSON or as a Python literal; by index if it is a mapping."""
    for key in LABEL_KEYS:
        try:
            value = ast.literal_eval(metadata[key])
        except (KeyError, ValueError, SyntaxError):
            continue
        if isinstance(value, dict):
            value = [value[index] for index in sorted(value, key=int)]
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [str(label) for label in value]
    return None


def _classes(path: Path, model: onnx.ModelProto) -> int:
    shape = model.graph.output[0].type.tensor_type.shape.dim
    if len(shape) != 2 or shape[1].dim_value < 2:
        sizes = [dimension.dim_value or dimension.dim_param for dimension in shape]
        raise ExportError(f"{path} gives {sizes}; a classifier gives (N, classes), at least two classes")
    return int(shape[1].dim_value)


def _check_batches(path: Path, imported: ImportedModel) -> None:
    """Refuse a model that works for the batch size of its export only, or mixes the images of a batch."""
    pixels = random_pixels(imported.preprocessing, 2)
    try:
        together = imported.logits(pixels)
        alone = np.concatenate([imported.logits(pixels[:1]), imported.logits(pixels[1:])])
    except Exception as error:  # onnxruntime raises types of its own
        raise ExportError(
            f"{path} does not run with other batch sizes than it was exported with: "
            f"{str(error).splitlines()[0]}. {_EXPORT_ADVICE}"
        ) from error
    if together.shape != alone.shape or not np.allclose(together, alone, rtol=1e-3, atol=1e-3):
        raise ExportError(f"{path} gives an image other scores in another batch; that cannot be served")
