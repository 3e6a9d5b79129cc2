"""A machine with stand-ins in place of its GPU and of libnvinfer, and engine packages for it."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest
from recording_cuda import DESKTOP, RecordingCuda, RecordingTensorRT

import runtime.tensorrt.engine as tensorrt
from models.preprocessing import Preprocessing
from runtime.manifest import MANIFEST_NAME, BatchSizes, Manifest, Provenance, Tensor, sha256_of
from runtime.tensorrt.compatibility import this_machine
from runtime.tensorrt.library import TensorRTLibrary, TensorRTLog

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")

SIZE, CLASSES = 6, 10
PLAN = b"ftrt a plan of TensorRT's"
REBUILD = "trimrt build student --target tensorrt"


def write_package(folder: Path, plan: bytes = PLAN, device=DESKTOP, **changes) -> Path:
    folder.mkdir()
    (folder / "engine.plan").write_bytes(plan)
    compatibility = this_machine(device).model_copy(update=changes.pop("compatibility", {}))
    manifest = Manifest(
        name="digits-fp16-tensorrt",
        created_at=datetime.now(timezone.utc),
        builder_version="0.1.0",
        backend="tensorrt",
        backend_version="10.3.0",
        precision="fp16",
        input=Tensor(name="images", dtype="uint8", shape=[-1, SIZE, SIZE, 3], layout="NHWC"),
        outputs=[
            Tensor(name="logits", dtype="float32", shape=[-1, CLASSES]),
            Tensor(name="probabilities", dtype="float32", shape=[-1, CLASSES]),
        ],
        batch=BatchSizes(min=1, opt=4, max=8),
        labels=[str(digit) for digit in range(CLASSES)],
        preprocessing=Preprocessing(resize=SIZE, height=SIZE, width=SIZE),
        compatibility=compatibility,
        provenance=Provenance(
            onnx_sha256="0" * 64, artefact="engine.plan", artefact_sha256=sha256_of(folder / "engine.plan")
        ),
        build_command=REBUILD,
    ).model_copy(update=changes)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


class Machine:
    """A machine with the stand-ins in place of GPU and libnvinfer."""

    def __init__(self, monkeypatch, cuda: RecordingCuda) -> None:
        self.cuda = cuda
        self.log = TensorRTLog()
        self.trt = RecordingTensorRT(trt, cuda, self.log)
        library = TensorRTLibrary(self.trt, "tensorrt", "10.3.0", self.log, object())
        monkeypatch.setattr(tensorrt, "load_tensorrt", lambda backend: library)
        monkeypatch.setattr(tensorrt, "open_cuda", lambda name: cuda)
