"""An ONNX classifier from anywhere, brought to the form that TrimRT's own exports have, and held against it.

The file is run as it is, by ONNX Runtime, on random pixels and on the user's own images. What was made of it
has to give the same, for single images and for a batch.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import (
    ExportError,
    add_pixels_input,
    open_session,
    random_pixels,
    require_same,
    rgb_normalisation,
    run_onnx,
)
from builder.prepare.heads import Head, possible_heads
from builder.prepare.labels import labels_of_json
from builder.prepare.mac_share import count_macs
from builder.prepare.normal_form import LUMA, mix_channels, normalise, slim
from builder.prepare.normalisations import NORMALISATIONS, Resizing, Taken, find_preprocessing, told_size
from builder.prepare.onnx_file import Signature, choose_output, first_line, read_model, read_signature
from builder.prepare.options import PrepareOptions
from models.preprocessing import Pixels, Preprocessing
from runtime.manifest import Activation

if TYPE_CHECKING:
    import onnx

LABEL_KEYS: Final = ("labels", "names", "classes", "character")  # the last is Paddle's
_RANDOM_IMAGES: Final = 4
_EXACT: Final = 1e-3  # of the largest score; FP32 arithmetic in another order stays below it
_ROUNDED: Final = 5e-2  # the same for a network in FP16 or BF16
_MATRICES: Final = {"BGR": np.eye(3, dtype=np.float32)[::-1], "L": np.array([LUMA], np.float32)}
_EXPORT_ADVICE: Final = "Export it with a dynamic batch size"


@dataclass(frozen=True)
class ImportedModel:
    """A classifier read from an ONNX file.

    Attributes:
        model: normalised float NCHW images of red, green and blue, any batch size, in; logits out.
        preprocessing: how an image becomes its input.
        activation: what makes probabilities of its logits.
        single: the file has one score, of the second of two classes.
        labels: of its classes, if the file tells.
        classes: how many there are.
        parameters: numbers in its weights.
        macs: multiply-accumulates for one image.
        notes: what was found out about it, for the user.
    """

    model: onnx.ModelProto
    preprocessing: Preprocessing
    activation: Activation
    single: bool
    labels: list[str] | None
    classes: int
    parameters: int
    macs: int
    notes: tuple[str, ...]

    def logits(self, pixels: Pixels) -> NDArray[np.float32]:
        """What the model makes of uint8 NHWC `pixels`, normalised here; shape (N, classes)."""
        return run_onnx(self.model, _normalised(pixels, self.preprocessing))


def import_onnx(
    path: Path, options: PrepareOptions, sample: Callable[[Preprocessing], Pixels] | None = None
) -> ImportedModel:
    """Read and adapt the classifier in an ONNX file.

    Args:
        path: the file.
        options: what it does not say itself.
        sample: some of the user's images, uint8 NHWC, to hold the result against the file with.

    Raises:
        ExportError: not ONNX, not a classifier of images, its preprocessing is unknown, or what was made of
            it does not give what it gives.
    """
    model = read_model(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    choose_output(path, model, options.output_name)
    told = told_size(options.preprocess, metadata, path.parent)
    signature = read_signature(path, model, options.size, told)
    taken = _preprocessing(path, options, metadata, signature)
    spec = taken.spec
    pixels = random_pixels(spec, _RANDOM_IMAGES)
    if sample is not None:
        pixels = np.concatenate([pixels, sample(spec)])
    images = _normalised(pixels, spec)
    outputs = _own_outputs(path, signature, images, spec)
    head = _adapt(path, model, signature, spec, images, outputs, options.activation)
    return ImportedModel(
        model=head.model,
        preprocessing=spec,
        activation=head.activation,
        single=head.single,
        labels=_labels(metadata),
        classes=max(outputs.shape[1], 2),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in head.model.graph.initializer if tensor.dims),
        macs=count_macs(head.model),
        notes=(str(taken), str(head)),
    )


def export_imported(imported: ImportedModel, path: Path) -> float:
    """Write the master graph: the model with pixels for input; returns the largest logit difference.

    Raises:
        ExportError: the master graph's output differs from the model's.
    """
    import onnx

    model = add_pixels_input(imported.model, imported.preprocessing, imported.activation)
    onnx.save(model, str(path))
    pixels = random_pixels(imported.preprocessing, 3)
    return require_same(path, pixels, imported.logits(pixels))


def _preprocessing(
    path: Path, options: PrepareOptions, metadata: dict[str, str], signature: Signature
) -> Taken:
    size = signature.height, signature.width
    asked = options.preprocess
    takes_pixels = np.issubdtype(signature.type, np.integer)
    channels: Any = "L" if signature.channels == 1 else "RGB"
    resizing = Resizing(options.resize, options.interpolation)
    try:
        taken = find_preprocessing(asked, resizing, metadata, path.parent, size, channels)
        if taken is None and takes_pixels:
            taken = find_preprocessing("0..255", resizing, {}, path.parent, size, channels)
            assert taken is not None, "it was named"
            taken = Taken(taken.spec, f"its input is {signature.type}")
    except ExportError as error:
        raise ExportError(f"{path}: {error}" if asked is None else str(error)) from error
    if taken is None:
        raise ExportError(
            f"{path} does not say how its images are normalised; say so with --preprocess: "
            f"{', '.join(NORMALISATIONS)}, or a JSON file such as "
            '{"resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'
        )
    if takes_pixels and not (
        np.allclose(taken.spec.mean, 0) and np.allclose(np.asarray(taken.spec.std) * 255, 1)
    ):
        raise ExportError(
            f"{path} takes pixels as they are, {signature.type}; leave out --preprocess, or give 0..255"
        )
    return taken


def _own_outputs(
    path: Path, signature: Signature, images: NDArray[np.float32], spec: Preprocessing
) -> NDArray[np.float32]:
    """What the file itself gives for `images`, shape (N, scores)."""
    matrix = _MATRICES.get(spec.channels)
    if matrix is not None:
        images = np.einsum("cr,nrhw->nchw", matrix, images)
    batch = signature.batch or 1
    results = []
    try:
        session = open_session(str(path))
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            (output,) = session.run([signature.output], {signature.input: signature.arrange(padded)})
            results.append(_rows(output, batch)[: len(part)])
    except ExportError as error:
        raise ExportError(f"{path} {error}") from error
    except Exception as error:  # onnxruntime raises types of its own
        raise ExportError(f"{path} does not run: {first_line(error)}") from error
    outputs = np.concatenate(results)
    if not np.isfinite(outputs).all():
        raise ExportError(f"{path} gives scores that are not numbers; check --preprocess")
    return outputs


def _rows(output: NDArray[Any], batch: int) -> NDArray[np.float32]:
    """Scores of shape (batch, classes), whatever the places of the dimensions of one."""
    if sum(size > 1 for size in output.shape[output.ndim > 1 :]) > 1 or output.size % batch:
        raise ExportError(f"gives {output.shape} for {batch} images; a classifier gives (N, classes)")
    return np.asarray(output, np.float32).reshape(batch, -1)


def _adapt(
    path: Path,
    model: onnx.ModelProto,
    signature: Signature,
    spec: Preprocessing,
    images: NDArray[np.float32],
    outputs: NDArray[np.float32],
    asked: Activation | None,
) -> Head:
    """The network in normal form, with logits that mean what the file's outputs mean."""
    bound = _ROUNDED if signature.type.itemsize <= 2 and not _is_integer(signature) else _EXACT
    bound *= max(1.0, float(np.abs(outputs).max()))
    fault = ""
    for fold_first in (False, True) if signature.batch is not None else (False,):
        normal = normalise(path, model, signature, fold_first=fold_first)
        matrix = _MATRICES.get(spec.channels)
        if matrix is not None:
            mix_channels(normal, matrix)
        try:
            heads = list(possible_heads(normal, outputs, asked))
        except ExportError as error:
            raise ExportError(f"{path}: {error}") from error
        for head in heads:
            ready = head._replace(model=slim(head.model))
            difference = _differs(ready, images, outputs, bound)
            if difference is None:
                return ready
            fault = fault or difference
    raise ExportError(f"{path} {fault}")


def _is_integer(signature: Signature) -> bool:
    return bool(np.issubdtype(signature.type, np.integer))


def _differs(
    head: Head, images: NDArray[np.float32], outputs: NDArray[np.float32], bound: float
) -> str | None:
    """How the adapted network differs from the file; None: it gives the same."""
    ends = [0, len(images) - 1]
    try:
        alone = head.own_outputs(np.concatenate([run_onnx(head.model, images[[i]]) for i in ends]))
    except Exception as error:  # onnxruntime raises types of its own
        return f"cannot be adapted: {first_line(error)}"
    same = outputs[ends]
    if alone.shape != same.shape or not np.abs(alone - same).max() <= bound:
        return "cannot be adapted: what was made of it gives other scores"
    try:
        together = head.own_outputs(run_onnx(head.model, images))
    except Exception as error:  # onnxruntime raises types of its own
        return (
            "does not run with other batch sizes than it was exported with: "
            f"{first_line(error)}. {_EXPORT_ADVICE}"
        )
    if together.shape != outputs.shape or not np.abs(together - outputs).max() <= bound:
        return f"gives an image other scores in another batch; that cannot be served. {_EXPORT_ADVICE}"
    return None


def _labels(metadata: dict[str, str]) -> list[str] | None:
    """Class labels from the file's metadata, as JSON, a Python literal or lines."""
    for key in LABEL_KEYS:
        if key not in metadata:
            continue
        for read in (json.loads, ast.literal_eval):
            try:
                return labels_of_json(read(metadata[key]))
            except (ValueError, SyntaxError, TypeError):
                continue
        lines = [line.strip() for line in metadata[key].splitlines() if line.strip()]
        if len(lines) > 1:
            return lines
    return None


def _normalised(pixels: Pixels, spec: Preprocessing) -> NDArray[np.float32]:
    """Float32 NCHW images of red, green and blue."""
    mean, std = (values.astype(np.float32) for values in rgb_normalisation(spec))
    images = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
