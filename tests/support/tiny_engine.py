"""A tiny real engine package: an ONNX graph of a few kilobytes, run by OpenVINO.

Its logits are a fixed random projection of a coarse thumbnail of the image, so two images give
different logits unless they look the same.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from builder.compile.targets.openvino.target import OpenVINOTarget
from models.preprocessing import Preprocessing
from runtime.manifest import (
    MANIFEST_NAME,
    BatchSizes,
    Evidence,
    Manifest,
    Precision,
    Predictions,
    Provenance,
    Tensor,
    sha256_of,
)

LABELS = ["red", "green", "blue", "cyan", "magenta", "yellow", "black", "white", "orange", "grey"]
SIDE = 32


def write_graph(path: Path, seed: int, classes: int = len(LABELS)) -> None:
    weights = np.random.default_rng(seed).normal(size=(48, classes)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["cast", "scale"], ["scaled"]),
            helper.make_node("Transpose", ["scaled"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("AveragePool", ["nchw"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes]),
        ],
        [
            numpy_helper.from_array(np.float32(1 / 255), "scale"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_graph_that_fails_on_white(path: Path, seed: int) -> None:
    """As `write_graph`, but of an image with a white pixel no logit is a finite number."""
    write_graph(path, seed)
    model = onnx.load(path)
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "finite"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    place = list(model.graph.node).index(last) + 1
    nodes = [
        helper.make_node("ReduceMax", ["scaled"], ["brightest"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Flatten", ["brightest"], ["flat_brightest"]),
        helper.make_node("Sub", ["one", "flat_brightest"], ["darkness"]),
        helper.make_node("Div", ["finite", "darkness"], ["logits"]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(place, node)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_package(
    directory: Path,
    name: str = "tiny",
    *,
    version: str = "1",
    precision: Precision = "fp32",
    seed: int = 0,
    min_batch: int = 1,
    max_batch: int = 8,
    classes: int = len(LABELS),
    write_graph: Callable[..., None] = write_graph,
    predictions: Predictions | None = None,
) -> Path:
    """A new engine package in `directory`.

    `seed` chooses the weights; `predictions` is what it is to have said of the validation images.
    """
    folder = directory / f"{name}-v{version}"
    folder.mkdir(parents=True)
    graph = folder / "source.onnx"
    write_graph(graph, seed, *([classes] if classes != len(LABELS) else []))
    batch = BatchSizes(min=min_batch, opt=max(min_batch, min(4, max_batch)), max=max_batch)
    artefact = OpenVINOTarget().compile(graph, folder, batch, lambda _step: None)
    manifest = Manifest(
        name=name,
        version=version,
        created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        builder_version="0",
        backend="openvino",
        backend_version=artefact.backend_version,
        precision=precision,
        input=Tensor(name="pixels", dtype="uint8", shape=[-1, SIDE, SIDE, 3], layout="NHWC"),
        outputs=[
            Tensor(name="logits", dtype="float32", shape=[-1, classes]),
            Tensor(name="probabilities", dtype="float32", shape=[-1, classes]),
        ],
        batch=batch,
        labels=LABELS[:classes],
        preprocessing=Preprocessing(resize=SIDE, height=SIDE, width=SIDE),
        compatibility=artefact.compatibility,
        provenance=Provenance(
            onnx_sha256=sha256_of(graph),
            artefact=artefact.file,
            artefact_sha256=sha256_of(folder / artefact.file),
            artefact_bytes=(folder / artefact.file).stat().st_size,
        ),
        evidence=predictions and _evidence(predictions),
        build_command="trimrt build tiny",
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


def _evidence(predictions: Predictions) -> Evidence:
    return Evidence(
        image_set="noise",
        images=sum(predictions.classes),
        reference_top1=None,
        engine_top1=None,
        label_agreement=1,
        max_logit_difference=0,
        latency_ms=1,
        throughput=1,
        weights_bytes=1,
        predictions=predictions,
    )
