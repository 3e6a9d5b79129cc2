"""A build kit of a few kilobytes, made without torch: its graph compiles, its images are noise."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from builder.kit import INPUT, KIT_NAME, LOGITS, PROBABILITIES, VERIFICATION_NAME

IMAGES, SIZE, CLASSES = 4, 8, 3


WEIGHTS = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, CLASSES)).astype(np.float32)


def small_graph() -> onnx.ModelProto:
    """Pixels in, logits and probabilities of `CLASSES` classes out; one weight tensor."""
    shape = ["N", SIZE, SIZE, 3]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [INPUT], ["scaled"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["scaled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], [LOGITS]),
            helper.make_node("Softmax", [LOGITS], [PROBABILITIES]),
        ],
        "small",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", CLASSES])
            for name in (LOGITS, PROBABILITIES)
        ],
        [onnx.numpy_helper.from_array(WEIGHTS, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def small_arrays() -> dict[str, np.ndarray]:
    """A verification set's, on which the graph is always right."""
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, SIZE, SIZE, 3), np.uint8)
    logits = pixels.reshape(IMAGES, -1).astype(np.float32) @ WEIGHTS
    return {"pixels": pixels, "targets": logits.argmax(axis=1), "logits": logits}


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """As a `.npz` file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def write_small_kit(
    folder: Path,
    *,
    graph: bytes | None = None,
    verification: bytes | None = None,
    edit: Callable[[dict[str, Any]], object] = lambda manifest: None,
) -> Path:
    """Write a kit whose hashes are right.

    Args:
        folder: made with its parents.
        graph: instead of `small_graph`.
        verification: instead of `small_arrays`.
        edit: changes the manifest before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph = small_graph().SerializeToString() if graph is None else graph
    verification = npz(small_arrays()) if verification is None else verification
    (folder / "fp32.onnx").write_bytes(graph)
    (folder / VERIFICATION_NAME).write_bytes(verification)
    manifest = {
        "builder_version": "0",
        "student": {
            "name": "small",
            "labels": [f"class {number}" for number in range(CLASSES)],
            "preprocessing": {"resize": SIZE, "height": SIZE, "width": SIZE},
            "checkpoint_sha256": None,
            "parameters": None,
            "macs": None,
        },
        "graphs": [
            {
                "file": "fp32.onnx",
                "sha256": hashlib.sha256(graph).hexdigest(),
                "precision": "fp32",
                "rest": "fp32",
                "weights_bytes": 0,
            }
        ],
        "verification_sha256": hashlib.sha256(verification).hexdigest(),
        "verification_images": "noise",
        "export_difference": 0.0,
        "command": "trimrt prepare small",
    }
    edit(manifest)
    (folder / KIT_NAME).write_text(json.dumps(manifest))
    return folder
