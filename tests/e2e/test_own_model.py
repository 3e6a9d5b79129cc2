"""A network from elsewhere, by the documented command: what is published, and what is not."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from running import running

from models.datasets import DataSplit, open_dataset
from models.preprocessing import Preprocessing
from runtime.manifest import Manifest, read_manifest
from server.settings import Settings
from trimrt.cli import main

SIDE = 8
SPEC = Preprocessing(resize=SIDE, height=SIDE, width=SIDE, mean=(0, 0, 0), std=(1, 1, 1))
Trimrt = Callable[..., Result]


@pytest.fixture(scope="module")
def weights(data: DataSplit) -> np.ndarray:
    """A linear classifier of handwritten digits, by least squares; shape (192 + 1, 10)."""
    pixels = data.train.load_pixels(SPEC).transpose(0, 3, 1, 2).reshape(len(data.train), -1) / 255
    inputs = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
    wanted = np.eye(10)[data.train.targets] * 12 - 6
    solved = np.linalg.solve(inputs.T @ inputs + np.eye(inputs.shape[1]), inputs.T @ wanted)
    return solved.astype(np.float32)


def write(path: Path, weights: np.ndarray, *, end: str | None = None, names: list[str] | None = None) -> Path:
    """The classifier as an ONNX file, with an activation at its end, and labels in its metadata."""
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["scores"]),
    ]
    if end is not None:
        nodes.append(helper.make_node(end, ["scores"], ["output"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", weights.shape[1]])],
        [
            numpy_helper.from_array(np.ascontiguousarray(weights[:-1]), "weights"),
            numpy_helper.from_array(weights[-1], "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if names:
        helper.set_model_props(model, {"names": str(dict(enumerate(names)))})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def arguments(model: Path, output: Path, *more: object, data: object = "digits") -> list[object]:
    chosen = ["--data", data, "--preprocess", "0..1", "-p", "fp32", "--target", "openvino", "-o", output]
    return ["build", model, *chosen, "--verification-images", 200, *more]


def manifest_of(package: Path) -> Manifest:
    return read_manifest(package)


def test_what_was_taken_is_said_and_kept(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path
) -> None:
    model = write(tmp_path / "model.onnx", weights)
    result = trimrt(*arguments(model, tmp_path / "engines", "--verification-images", 800))
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "images: the shorter side becomes 8, then the middle 8x8; RGB, mean 0 0 0" in said
    assert "outputs: logits; activation softmax" in said
    assert "labels: the folders of digits, in their order: 0, 1, 2" in said
    manifest = manifest_of(tmp_path / "engines/model-fp32-openvino")
    assert manifest.preprocessing == SPEC
    assert manifest.provenance.source == str(tmp_path / "model.onnx")
    # FP32's accuracy is that of the images as they are, computed here without any of the builder.
    judging = open_dataset("digits", validation_share=0.5).validation
    pixels = judging.load_pixels(SPEC).transpose(0, 3, 1, 2).reshape(len(judging), -1) / 255
    right = (pixels @ weights[:-1] + weights[-1]).argmax(axis=1) == judging.targets
    assert manifest.evidence is not None
    assert manifest.evidence.originals == len(right)
    assert manifest.evidence.reference_top1 == pytest.approx(right.mean())


def test_labels_of_the_file_are_served_in_its_order(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path
) -> None:
    order = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    names = [str(number) for number in order]
    model = write(tmp_path / "model.onnx", weights[:, order], names=names)
    result = trimrt(*arguments(model, tmp_path))
    assert result.exit_code == 0, result.output
    manifest = manifest_of(tmp_path / "model-fp32-openvino")
    assert manifest.labels == names
    assert manifest.evidence is not None
    assert manifest.evidence.reference_top1 is not None
    assert manifest.evidence.reference_top1 > 0.8


@pytest.mark.parametrize(
    ("order", "names", "message"),
    [
        ([0, 1, 9, 2, 3, 4, 5, 6, 7, 8], None, "with its labels in another order (output 2 is 9"),
        (list(range(10)), [str(9 - i) for i in range(10)], "with its labels in another order"),
        (list(range(10)), [f"n{i}" for i in range(10)], "folders 0, 1, 2, 3, 4 and 5 more"),
        (list(range(9)), None, "the network has 9 classes and the data has 10 folders"),
    ],
    ids=["another order", "names reversed", "other names", "one too few"],
)
def test_a_network_that_cannot_be_right_is_not_published(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path, order, names, message
) -> None:
    model = write(tmp_path / "model.onnx", weights[:, order], names=names)
    result = trimrt(*arguments(model, tmp_path))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.glob("*-openvino"))


def test_low_accuracy_may_be_asked_for(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path
) -> None:
    model = write(tmp_path / "model.onnx", weights[:, ::-1])
    assert trimrt(*arguments(model, tmp_path), "--allow-low-accuracy").exit_code == 0


def test_a_package_is_replaced_by_one_of_the_same_network_alone(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path
) -> None:
    one = write(tmp_path / "one" / "model.onnx", weights)
    other = write(tmp_path / "other" / "model.onnx", weights * 0.5)
    package = tmp_path / "engines/model-fp32-openvino"
    assert trimrt(*arguments(one, tmp_path / "engines")).exit_code == 0
    refused = trimrt(*arguments(other, tmp_path / "engines"))
    assert refused.exit_code == 1
    said = " ".join(refused.output.split())
    assert f"is of another network: it was made of {one}, this one is {other}" in said
    assert "--name" in said
    assert "--replace" in said
    assert manifest_of(package).version == "1"

    write(one, weights * 0.9)  # exported again
    assert trimrt(*arguments(one, tmp_path / "engines")).exit_code == 0
    assert manifest_of(package).version == "2"

    named = trimrt(*arguments(other, tmp_path / "engines"), "--name", "second")
    assert named.exit_code == 0, named.output
    assert (tmp_path / "engines/second-fp32-openvino/manifest.json").is_file()

    assert trimrt(*arguments(other, tmp_path / "engines"), "--replace").exit_code == 0
    assert manifest_of(package).provenance.source == str(other)


def test_unsorted_photographs_judge_by_agreement(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in data.validation.paths[:24]:
        (folder / path.name).write_bytes(path.read_bytes())
    result = trimrt(*arguments(write(tmp_path / "model.onnx", weights), tmp_path, data=folder))
    assert result.exit_code == 0, result.output
    assert "the images have no labels: engines are judged by agreement" in " ".join(result.output.split())
    evidence = manifest_of(tmp_path / "model-fp32-openvino").evidence
    assert evidence is not None
    assert (evidence.reference_top1, evidence.engine_top1, evidence.drop) == (None, None, None)
    assert evidence.label_agreement == 1
    assert "the images have no labels" in trimrt("inspect", tmp_path / "model-fp32-openvino").output


@pytest.mark.parametrize("end", ["Sigmoid", "Softmax"])
def test_the_server_answers_with_the_probabilities_that_the_file_gives(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path, end: str
) -> None:
    model = write(tmp_path / "model.onnx", weights, end=end)
    result = trimrt(*arguments(model, tmp_path / "engines"))
    assert result.exit_code == 0, result.output
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    settings = Settings(engine_dir=tmp_path / "engines", port=0)
    with running(settings) as server:
        for path in data.test.paths[:8]:
            answer = server.predict(path.read_bytes(), params={"top_k": 10}).json()
            pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
            (expected,) = session.run(None, {"input": pixels.transpose(2, 0, 1)[None]})[0]
            served = {each["label"]: each["probability"] for each in answer["results"][0]["predictions"]}
            assert answer["engine"]["activation"] == end.lower()
            np.testing.assert_allclose([served[str(digit)] for digit in range(10)], expected, atol=1e-4)


def test_two_classes_have_a_default_number_of_labels(
    weights: np.ndarray, data: DataSplit, trimrt: Trimrt, tmp_path: Path
) -> None:
    """One logit: is it a nine?"""
    folder = tmp_path / "photographs"
    for path, target in zip(data.train.paths[:300], data.train.targets[:300], strict=True):
        place = folder / ("nine" if target == 9 else "another")
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    logit = weights[:, 9:] - 0.0
    model = write(tmp_path / "model.onnx", logit)
    labels = tmp_path / "labels.txt"
    labels.write_text("nine\n")
    result = trimrt(*arguments(model, tmp_path, "--labels", labels, data=folder))
    assert result.exit_code == 0, result.output
    manifest = manifest_of(tmp_path / "model-fp32-openvino")
    assert manifest.labels == ["another", "nine"]
    images = [str(path) for path in data.test.paths[:6]]
    out = tmp_path / "labels.csv"
    command = ["predict", *images, "--engine", str(tmp_path / "model-fp32-openvino"), "--out", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == images
    for row, path in zip(rows, data.test.paths[:6], strict=True):
        pixels = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1).ravel() / 255
        assert row["label"] == ("nine" if pixels @ logit[:-1, 0] + logit[-1, 0] > 0 else "another")


def test_a_wrong_normalisation_is_found_out_and_the_right_one_named(trimrt: Trimrt, tmp_path: Path) -> None:
    """Light or dark, of which everything is light if pixels go up to 255."""
    for number in range(40):
        for place, label in enumerate(("dark", "light")):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (40 + number + 120 * place,) * 3).save(path)
    brightness = np.full((193, 1), 20 / 192, np.float32)
    brightness[-1] = -20 * 0.5
    model = write(tmp_path / "model.onnx", brightness)
    result = trimrt(*arguments(model, tmp_path, "--preprocess", "0..255", data=tmp_path / "data"))
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "gets 50% of your own images right, as a mean of all classes, and guessing gets 50%" in said
    assert re.search(r"\(with --preprocess (imagenet|0..1|-1..1) it gets 100%\)", said)
    assert trimrt(*arguments(model, tmp_path, data=tmp_path / "data")).exit_code == 0
