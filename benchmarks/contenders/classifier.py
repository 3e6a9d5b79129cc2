"""What every contender does with a JPEG, whichever server it stands behind.

Two forms:

- `usual`: as users of these servers write it. Pillow decodes and resizes, NumPy normalises, and the
  engine takes float NCHW tensors.
- `trimrt`: TrimRT's own preprocessing, and its engine that takes pixels, so that what remains is what
  the server adds.

Both run the same INT8 network. This module is imported inside each contender's own environment.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from PIL import Image

PORT = int(os.environ.get("BENCHMARK_PORT", "0"))
FORM = os.environ.get("BENCHMARK_FORM", "usual")
PACKAGE = Path(os.environ.get("BENCHMARK_PACKAGE", ""))
WORKERS = int(os.environ.get("BENCHMARK_WORKERS", os.cpu_count() or 1))

MAX_BATCH = 32
TOP_K = 5

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


class Classifier:
    """An OpenVINO network and its preprocessing; safe to call from several threads.

    Args:
        threads: CPU threads that OpenVINO computes with.
        streams: how many inferences run at once on those threads.
        form: see above.
        package: TrimRT's engine package; beside it lies `float.onnx`.
    """

    def __init__(self, threads: int, streams: int = 1, *, form: str = FORM, package: Path = PACKAGE) -> None:
        manifest: dict[str, Any] = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
        self.labels: list[str] = manifest["labels"]
        self.preprocess: Callable[[bytes], NDArray[Any]] = (
            _trimrt_pixels(manifest["preprocessing"]) if form == "trimrt" else pillow_tensor
        )
        core = openvino.Core()
        configuration: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,
        }
        if form == "trimrt":
            blob = (package / manifest["provenance"]["artefact"]).read_bytes()
            configuration["INFERENCE_PRECISION_HINT"] = "f32"
            self._model = core.import_model(io.BytesIO(blob), "CPU", configuration)
        else:
            self._model = core.compile_model(package.parent / "float.onnx", "CPU", configuration)
        self._local = threading.local()

    def infer(self, images: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
        """The answers for preprocessed images, which are run as one batch."""
        if not hasattr(self._local, "request"):
            self._local.request = self._model.create_infer_request()
        logits = self._local.request.infer([np.stack(images)])[0]
        return [self._answer(row) for row in logits]

    def classify(self, files: Sequence[bytes]) -> list[dict[str, Any]]:
        """The answers for JPEG files, decoded one after the other and run as one batch."""
        return self.infer([self.preprocess(file) for file in files])

    def _answer(self, logits: NDArray[np.float32]) -> dict[str, Any]:
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(shares)[::-1][:TOP_K]
        return {"predictions": [{"label": self.labels[i], "probability": float(shares[i])} for i in best]}


def _trimrt_pixels(preprocessing: dict[str, Any]) -> Callable[[bytes], NDArray[Any]]:
    import cv2

    from models.preprocessing import Preprocessing, load_pixels

    cv2.setNumThreads(1)  # in the contender's own process, as in TrimRT's server
    spec = Preprocessing.model_validate(preprocessing)
    return lambda file: load_pixels(file, spec)


def pillow_tensor(file: bytes) -> NDArray[np.float32]:
    """Shorter side 256, centre crop 224, ImageNet normalisation, as `(3, 224, 224)`."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
    return np.ascontiguousarray(((pixels / 255 - _MEAN) / _STD).transpose(2, 0, 1))
