"""A network that is there already, opened as the teacher of a compression run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from builder.prepare.export import ExportError, open_session, rgb_normalisation
from builder.prepare.import_onnx import ImportedModel, import_onnx
from builder.prepare.labels import labels_beside, match_labels, read_labels
from builder.prepare.options import PrepareOptions
from models.checkpoint import load_checkpoint
from models.preprocessing import Preprocessing
from models.teacher import ReadyTeacher
from runtime.manifest import sha256_of


def open_teacher(
    path: Path, options: PrepareOptions | None = None, *, threads: int | None = None
) -> ReadyTeacher:
    """A checkpoint's network, or the classifier in an ONNX file, which ONNX Runtime runs on the CPU.

    Args:
        path: the checkpoint's folder, or the file.
        options: what an ONNX file does not say itself: how it takes images, and which class each output is.
        threads: of ONNX Runtime; None: as many as there are cores.

    Raises:
        CheckpointError: a damaged checkpoint.
        ExportError: no classifier of images that TrimRT can take, or labels that do not exclude each other.
    """
    if path.is_dir():
        return _of_checkpoint(path)
    options = options or PrepareOptions()
    imported = import_onnx(path, options)
    if imported.activation != "softmax":
        raise ExportError(
            f"of {path} any number of labels may be true of an image; a student learns from a teacher that "
            "chooses one (if this one does: --teacher-activation softmax)"
        )
    spec = imported.preprocessing
    mean, std = (tuple(values.tolist()) for values in rgb_normalisation(spec))
    return ReadyTeacher(
        name=path.stem,
        architecture="onnx",
        sha256=sha256_of(path),
        preprocessing=Preprocessing.model_validate(
            spec.model_dump() | {"channels": "RGB", "mean": mean, "std": std}
        ),
        logits=_run(imported, threads),
        outputs_of=_outputs_of(imported, path, options),
        parameters=max(imported.parameters, 1),
        macs=max(imported.macs, 1),
    )


def _of_checkpoint(folder: Path) -> ReadyTeacher:
    network, card = load_checkpoint(folder)

    def logits(images: Tensor) -> Tensor:
        result: Tensor = network.to(images.device)(images)
        return result

    return ReadyTeacher(
        name=card.name,
        architecture=card.architecture,
        sha256=card.weights_sha256,
        preprocessing=card.preprocessing,
        logits=logits,
        outputs_of=lambda classes: (
            match_labels(
                card.labels, f"the card of {folder}", classes, len(card.labels), single=False
            ).classes
        ),
        parameters=card.metrics.parameters,
        macs=card.metrics.macs,
    )


def _run(imported: ImportedModel, threads: int | None) -> Callable[[Tensor], Tensor]:
    session = open_session(imported.model.SerializeToString(), threads=threads)
    given, wanted = session.get_inputs()[0].name, session.get_outputs()[0].name

    def logits(images: Tensor) -> Tensor:
        (result,) = session.run([wanted], {given: images.float().cpu().contiguous().numpy()})
        return torch.from_numpy(result).to(images.device)

    return logits


def _outputs_of(
    imported: ImportedModel, path: Path, options: PrepareOptions
) -> Callable[[Sequence[str]], NDArray[np.int64]]:
    told, source = imported.labels, f"the metadata of {path}"
    if options.labels is not None:
        told, source = read_labels(options.labels), str(options.labels)
    elif told is None and (beside := labels_beside(path.parent)) is not None:
        told, source = beside

    def outputs_of(classes: Sequence[str]) -> NDArray[np.int64]:
        return match_labels(told, source, classes, imported.classes, imported.single).classes

    return outputs_of
