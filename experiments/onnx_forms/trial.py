"""One form, taken in by the import and run as an engine, beside PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from builder.kit import INPUT, LOGITS, PROBABILITIES
from builder.prepare.heads import probabilities
from builder.prepare.import_onnx import ImportedModel, export_imported, import_onnx
from experiments.onnx_forms.forms import Form
from experiments.onnx_forms.small_networks import SIDE
from models.preprocessing import Pixels


def pixels(count: int) -> Pixels:
    """Random images of the network's size."""
    return np.random.default_rng(5).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def normalised(images: Pixels, imported: ImportedModel) -> torch.Tensor:
    """NCHW images as the network takes them."""
    spec = imported.preprocessing
    order = [2, 1, 0] if spec.channels == "BGR" else [0, 1, 2]
    mean, std = (torch.tensor(values)[order][:, None, None] for values in (spec.mean, spec.std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def run_engine(
    imported: ImportedModel, folder: Path, images: Pixels
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and probabilities of the master graph, compiled by OpenVINO."""
    import openvino

    path = folder / "master.onnx"
    export_imported(imported, path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled({INPUT: images})
    return result[LOGITS], result[PROBABILITIES]


class Outcome(NamedTuple):
    """A form's engine on a number of images.

    Attributes:
        imported: what was read from the file.
        logits: of the engine.
        probabilities: of the engine.
        expected: probabilities by PyTorch.
    """

    imported: ImportedModel
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    expected: NDArray[np.float32]

    @property
    def difference(self) -> float:
        """The largest of a probability."""
        return float(np.abs(self.probabilities - self.expected).max())


def try_form(form: Form, folder: Path) -> Outcome:
    """Write the form into `folder`, take it in, and run its engine."""
    form.write(folder / "model.onnx")
    imported = import_onnx(folder / "model.onnx", form.wanted, lambda _: pixels(8))
    images = pixels(7)
    with torch.no_grad():
        expected = form.expected(normalised(images, imported)).numpy()
    found = run_engine(imported, folder, images)
    return Outcome(imported, *found, probabilities(expected, form.activation))
