"""Bring your own ONNX: what is adapted, what is refused, and that nothing about it is guessed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from small_student import SPEC
from torch import nn

from builder.finding import MissingSourceError, find_source
from builder.prepare.export import ExportError, quiet, run_onnx
from builder.prepare.import_onnx import export_imported, import_onnx
from builder.prepare.legality import require_legal
from builder.prepare.normalisations import NORMALISATIONS
from builder.prepare.onnx_file import read_model
from builder.prepare.options import PrepareOptions
from models.checkpoint import load_checkpoint
from models.datasets import DataSplit
from runtime.loading import load_engine
from runtime.manifest import read_manifest

SIZE, CLASSES = 8, 5


def classifier(
    *,
    batch: int | str = "batch",
    shape: tuple[int | str, ...] = (3, SIZE, SIZE),
    opset: int = 18,
    softmax: bool = False,
    kind: int = TensorProto.FLOAT,
    metadata: dict[str, str] | None = None,
    reshape: list[int] | None = None,
) -> onnx.ModelProto:
    """A linear classifier of images, as other tools might write it."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(3 * SIZE * SIZE, CLASSES)).astype(np.float32) / 50
    constants = [numpy_helper.from_array(weights, "weights")]
    nodes = [helper.make_node("Flatten", ["input"], ["flat"])]
    if reshape:
        constants.append(numpy_helper.from_array(np.asarray(reshape, np.int64), "shape"))
        nodes = [helper.make_node("Reshape", ["input", "shape"], ["flat"])]
    nodes.append(helper.make_node("MatMul", ["flat", "weights"], ["scores"]))
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["output"], axis=-1))
    output = "output" if softmax else "scores"
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("input", kind, [batch, *shape])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    return model


@pytest.fixture
def save(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    def write(model: onnx.ModelProto) -> Path:
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def expected_logits(images: np.ndarray, normalisation: str) -> np.ndarray:
    """The classifier in plain NumPy."""
    mean, std, channels = NORMALISATIONS[normalisation]
    images = images[..., ::-1] if channels == "BGR" else images
    weights = numpy_helper.to_array(classifier().graph.initializer[0])
    normalised = (
        ((images / 255 - np.asarray(mean)) / np.asarray(std)).transpose(0, 3, 1, 2).reshape(len(images), -1)
    )
    return normalised @ weights


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_master_graph_takes_pixels_and_gives_the_models_logits(save, tmp_path, normalisation):
    imported = import_onnx(save(classifier()), PrepareOptions(preprocess=normalisation))
    difference = export_imported(imported, tmp_path / "master.onnx")
    images = pixels(5)
    logits = run_onnx(tmp_path / "master.onnx", images)
    np.testing.assert_allclose(logits, expected_logits(images, normalisation), rtol=1e-3, atol=1e-3)
    assert difference < 1e-2
    assert require_legal(onnx.load(tmp_path / "master.onnx")) == []


@pytest.mark.parametrize(
    "changes",
    [{"softmax": True}, {"batch": 1}, {"batch": 4, "reshape": [4, -1]}, {"opset": 13}],
)
def test_a_softmax_a_fixed_batch_and_an_older_opset_are_adapted(save, tmp_path, changes):
    export_imported(
        import_onnx(save(classifier(**changes)), PrepareOptions(preprocess="imagenet")),
        tmp_path / "master.onnx",
    )
    images = pixels(7)
    logits = run_onnx(tmp_path / "master.onnx", images)
    np.testing.assert_allclose(logits, expected_logits(images, "imagenet"), rtol=1e-3, atol=1e-3)


def test_preprocessing_and_labels_are_read_from_the_files_metadata(save):
    labels = ["ant", "bee", "cat", "dog", "emu"]
    spec = {"resize": 10, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    names = str(dict(enumerate(labels)))  # as Ultralytics writes them
    imported = import_onnx(
        save(classifier(metadata={"preprocessing": json.dumps(spec), "names": names})), PrepareOptions()
    )
    assert (imported.preprocessing.resize, imported.preprocessing.height) == (10, SIZE)
    assert imported.preprocessing.mean == (0.1, 0.2, 0.3)
    assert imported.labels == labels
    assert imported.classes == CLASSES


def test_preprocessing_is_read_from_a_file(save, tmp_path):
    file = tmp_path / "preprocessing.json"
    file.write_text(json.dumps({"resize": 9, "mean": [0, 0, 0], "std": [1, 1, 1]}))
    assert import_onnx(save(classifier()), PrepareOptions(preprocess=str(file))).preprocessing.resize == 9


@pytest.mark.parametrize(
    ("model", "preprocess", "message"),
    [
        (
            classifier(),
            None,
            "does not say how its images are normalised; say so with --preprocess: imagenet",
        ),
        (classifier(), "keras", r"--preprocess keras is neither one of imagenet, .* nor a file"),
        (classifier(metadata={"preprocessing": "{"}), None, "metadata describe no preprocessing"),
        (classifier(shape=(4, SIZE, SIZE)), "imagenet", r"\(batch, 4, 8, 8\); images have 1 or 3 channels"),
        (classifier(shape=(3, "height", "width")), "imagenet", "say which with --image-size"),
        (classifier(shape=(3 * SIZE * SIZE,)), "imagenet", r"takes input \(batch, 192\), no batch of images"),
        (classifier(kind=TensorProto.DOUBLE), "imagenet", "model.onnx does not run"),
        (classifier(reshape=[2, 192]), "imagenet", "model.onnx does not run|dynamic batch size"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_what_to_do(save, model, preprocess, message):
    with pytest.raises(ExportError, match=message):
        import_onnx(save(model), PrepareOptions(preprocess=preprocess))


def test_two_outputs_are_told_apart_by_name(save):
    model = classifier()
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["batch", 192]))
    with pytest.raises(ExportError, match=r"2 outputs: scores \(batch, 5\), flat \(batch, 192\); name"):
        import_onnx(save(model), PrepareOptions(preprocess="imagenet"))
    assert (
        import_onnx(save(model), PrepareOptions(preprocess="imagenet", output_name="scores")).classes
        == CLASSES
    )
    with pytest.raises(ExportError, match="has no output 'other'; it has scores, flat"):
        import_onnx(save(model), PrepareOptions(preprocess="imagenet", output_name="other"))


def followed_by(*nodes: onnx.NodeProto, output: str, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """The classifier with other nodes behind its scores, which make the output."""
    model = classifier()
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([CLASSES - 1], np.int64), "count"))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(0, np.float32), "half"))
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(output, kind, ["batch", None]))
    return model


BEST = helper.make_node("TopK", ["scores", "count"], ["best", "which"], "best")
ABOVE = helper.make_node("Greater", ["scores", "half"], ["above"], "above")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (followed_by(BEST, output="best"), r"node 'best' \(TopK\) leaves no score for each class"),
        (followed_by(BEST, output="which", kind=TensorProto.INT64), "'which' is a decision or a table"),
        (followed_by(ABOVE, output="above", kind=TensorProto.BOOL), "'above' is a decision or a table"),
        (
            followed_by(
                ABOVE, helper.make_node("Cast", ["above"], ["yes"], to=TensorProto.FLOAT), output="yes"
            ),
            r"node 'above' \(Greater\) leaves no score",
        ),
        (
            followed_by(
                helper.make_node("ArgMax", ["scores"], ["label"], "label", axis=1, keepdims=1),
                helper.make_node("Cast", ["label"], ["number"], to=TensorProto.FLOAT),
                output="number",
            ),
            r"node 'label' \(ArgMax\) leaves no score",
        ),
        (
            followed_by(
                helper.make_node("Softmax", ["scores"], ["shares"], axis=1),
                helper.make_node("ReduceMax", ["shares", "axes"], ["sure"], "sure", keepdims=1),
                output="sure",
            ),
            r"node 'sure' \(ReduceMax\) leaves no score",
        ),
    ],
    ids=["topk", "its-places", "above", "above-as-number", "argmax-as-number", "max"],
)
def test_decisions_are_not_taken_for_scores(save, model, message):
    """Sorted scores, class numbers and yes or no look like scores, and would be served as such."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([1], np.int64), "axes"))
    with pytest.raises(ExportError, match=message):
        import_onnx(save(model), PrepareOptions(preprocess="imagenet"))


def test_what_only_other_outputs_need_may_be_of_any_kind(save):
    """Converters of scikit-learn's put a table of labels beside the probabilities."""
    table = helper.make_node(
        "ZipMap", ["scores"], ["table"], domain="ai.onnx.ml", classlabels_int64s=range(CLASSES)
    )
    model = followed_by(table, output="scores")
    numbers = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    model.graph.output.append(helper.make_value_info("table", helper.make_sequence_type_proto(numbers)))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    path = save(model)
    with pytest.raises(ExportError, match=r"2 outputs: scores .*, table \(no tensor\); name its scores"):
        import_onnx(path, PrepareOptions(preprocess="imagenet"))
    with pytest.raises(ExportError, match="'table' is a decision or a table"):
        import_onnx(path, PrepareOptions(preprocess="imagenet", output_name="table"))
    assert import_onnx(path, PrepareOptions(preprocess="imagenet", output_name="scores")).classes == CLASSES


@pytest.mark.parametrize("layer", ["BatchNorm1d", "Dropout"])
def test_a_network_that_was_exported_while_it_trained_is_told_so(tmp_path, layer):
    inner = nn.Linear(3 * SIZE * SIZE, CLASSES)
    network = nn.Sequential(
        nn.Flatten(), inner, nn.BatchNorm1d(CLASSES) if layer != "Dropout" else nn.Dropout()
    )
    with quiet():
        torch.onnx.export(
            *(network.train(), (torch.zeros(2, 3, SIZE, SIZE),), str(tmp_path / "model.onnx")),
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
        )
    with pytest.raises(ExportError, match=r"is still training; export the network after its eval\(\)"):
        import_onnx(tmp_path / "model.onnx", PrepareOptions(preprocess="imagenet"))


def test_a_model_that_mixes_the_images_of_a_batch_is_refused(save):
    model = classifier()
    axes = numpy_helper.from_array(np.asarray([0], np.int64), "axes")
    model.graph.initializer.append(axes)
    model.graph.node[-1].output[0] = "own"
    model.graph.node.append(helper.make_node("ReduceMean", ["own", "axes"], ["mean"], keepdims=1))
    model.graph.node.append(helper.make_node("Sub", ["own", "mean"], ["scores"]))
    with pytest.raises(ExportError, match="other scores in another batch"):
        import_onnx(save(model), PrepareOptions(preprocess="imagenet"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 4000), value=st.integers(0, 255), length=st.integers(1, 64))
def test_a_damaged_file_is_refused_or_read_but_never_crashes(tmp_path, position, value, length):
    data = bytearray(classifier().SerializeToString())
    start = position % len(data)
    data[start : start + length] = bytes([value]) * length
    path = tmp_path / "damaged.onnx"
    path.write_bytes(bytes(data))
    try:
        assert import_onnx(path, PrepareOptions(preprocess="imagenet")).preprocessing.height > 0
    except ExportError as error:
        assert str(path) in str(error)  # noqa: PT017  # refused is as good as read


def _sparse(tensor: onnx.TensorProto, *, flat: bool) -> onnx.SparseTensorProto:
    values = numpy_helper.to_array(tensor)
    places = np.argwhere(values)
    kept = numpy_helper.from_array(values[tuple(places.T)], tensor.name)
    indices = np.ravel_multi_index(tuple(places.T), values.shape) if flat else places
    return helper.make_sparse_tensor(
        kept, numpy_helper.from_array(indices.astype(np.int64), f"{tensor.name}_places"), values.shape
    )


@pytest.mark.parametrize("form", ["among the weights, flat", "among the weights, by axis", "in a node"])
def test_weights_that_are_kept_without_their_zeros_are_filled_up(save, tmp_path, form):
    """As pruned networks are stored."""
    model = classifier()
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weights).copy()
    values[np.abs(values) < np.median(np.abs(values))] = 0
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    whole = save(model)
    expected = run_onnx(onnx.load(whole), pixels(4).transpose(0, 3, 1, 2).astype(np.float32))
    kept = _sparse(weights, flat="flat" in form)
    if form == "in a node":
        model.graph.node.insert(0, helper.make_node("Constant", [], [weights.name], sparse_value=kept))
    else:
        model.graph.sparse_initializer.append(kept)
    model.graph.initializer.remove(weights)
    read = read_model(save(model))
    assert not read.graph.sparse_initializer
    assert weights.name in {tensor.name for tensor in read.graph.initializer}
    images = pixels(4).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(run_onnx(read, images), expected)


def test_weights_that_grow_beyond_what_a_file_can_hold_are_refused(save):
    model = classifier()
    bomb = _sparse(numpy_helper.from_array(np.ones((1, 1), np.float32), "bomb"), flat=True)
    bomb.dims[:] = [1 << 20, 1 << 20]
    model.graph.sparse_initializer.append(bomb)
    with pytest.raises(ExportError, match=r"bomb take 4,398,046,511,104 bytes"):
        read_model(save(model))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("model.onnx", b"<!DOCTYPE html><html></html>", "is a web page; download the file itself"),
        ("model.tflite", b"\x1c\0\0\0TFL3" + bytes(64), r"tf2onnx.convert --tflite .*model.tflite --output"),
        ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), r"Keras.*model.export"),
        ("model.xml", b'<?xml version="1.0"?><net name="m"/>', "OpenVINO.*the network that it was made from"),
        ("model.pb", b"\x08\x01\x12\x10\x01\x02", "is a TensorFlow graph"),
        ("model.pdmodel", b"\x0a\x95\x01\x08", "paddle2onnx"),
        ("model.engine", b"ftrt" + bytes(64), "is a TensorRT engine"),
        ("model.onnx", b"PK\x03\x04" + bytes(64), "is a damaged archive"),
    ],
)
def test_what_is_given_for_an_onnx_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        read_model(path)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("archive/data.pkl", "is a file of PyTorch"),
        ("model.weights.h5", "is a model of Keras"),
        ("nets/best.onnx", "unpack it and name nets/best.onnx"),
        ("notes.txt", "is an archive without an ONNX model"),
    ],
)
def test_an_archive_given_for_an_onnx_file_is_told_by_what_is_in_it(tmp_path, inner, message):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inner, b"")
    with pytest.raises(ExportError, match=message):
        read_model(path)


def test_a_folder_of_tensorflows_is_named(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(MissingSourceError, match=r"SavedModel of TensorFlow; .* --saved-model"):
        find_source(tmp_path)


def test_scores_whose_sum_no_32_bits_hold_are_read(save):
    model = classifier()
    for tensor in model.graph.initializer:
        if tensor.name == model.graph.node[-1].input[1]:
            weights = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(weights, -3e36), tensor.name))
    assert import_onnx(save(model), PrepareOptions(preprocess="imagenet")).preprocessing.height > 0


# The whole way


@pytest.fixture(scope="module")
def foreign(checkpoint: Path, tmp_path_factory) -> Path:
    """The small student as someone else would export it: NCHW floats, one image, no metadata."""
    network, _ = load_checkpoint(checkpoint)
    path = tmp_path_factory.mktemp("foreign") / "My Model.onnx"
    with quiet():
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 3, SPEC.height, SPEC.width),),
            str(path),
            dynamo=True,
            opset_version=18,
        )
    spec = {"resize": SPEC.resize, "mean": SPEC.mean, "std": SPEC.std}
    (path.parent / "preprocessing.json").write_text(json.dumps(spec))
    return path


def test_a_foreign_model_becomes_the_same_engine_as_the_checkpoint(
    foreign: Path, checkpoint: Path, data: DataSplit, tmp_path: Path, trimrt: Callable[..., Result]
):
    result = trimrt(
        *("build", foreign, "-p", "fp32", "--target", "openvino", "-o", tmp_path, "--data", "digits"),
        *("--preprocess", foreign.parent / "preprocessing.json", "--calibration-images", 8),
    )
    assert result.exit_code == 0, result.output
    package = tmp_path / "my-model-fp32-openvino"
    manifest = read_manifest(package)
    assert manifest.labels == list(data.labels)
    assert manifest.evidence is not None
    images = data.test.load_pixels(SPEC)[:8]
    slot = load_engine(package).open_slot()
    slot.pixels[:8] = images
    network, _ = load_checkpoint(checkpoint)
    from models.evaluation import predict_logits

    np.testing.assert_allclose(
        slot.infer(8).logits, predict_logits(network, images, SPEC), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not say how its images are normalised"),
        (["--preprocess", "imagenet"], "a network from elsewhere needs --data"),
        (
            ["--preprocess", "imagenet", "--data", "digits", "--labels", "/nowhere"],
            "no such file or folder: /nowhere",
        ),
    ],
)
def test_what_is_missing_is_asked_for(
    foreign: Path, tmp_path: Path, trimrt: Callable[..., Result], arguments, message
):
    result = trimrt("build", foreign, "-p", "fp32", "-o", tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in result.output
