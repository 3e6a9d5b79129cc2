"""Every form that exporters give a classifier becomes an engine that gives what the file gives.

The forms are those of the table in docs/your-model.md (`experiments/onnx_forms`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from builder.prepare.export import ExportError
from builder.prepare.import_onnx import export_imported, import_onnx
from builder.prepare.mac_share import int8_share
from builder.prepare.options import PrepareOptions
from builder.prepare.sources import open_onnx
from experiments.onnx_forms.forms import FORMS, WANTED, external, nhwc, open_sizes, pixels_in, plain
from experiments.onnx_forms.small_networks import CLASSES, SIDE, WIDTH, Tail, export, network
from experiments.onnx_forms.trial import normalised, pixels, run_engine, try_form

SHAPES = ("ReduceMean", "GlobalAveragePool", "Reshape", "Flatten", "Identity", "Transpose")


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_of_any_form_gives_the_probabilities_of_the_network(form: str, tmp_path: Path) -> None:
    outcome = try_form(FORMS[form], tmp_path)
    assert (np.ptp(outcome.expected, axis=1) > 0.1).all()  # so that the order of classes matters
    np.testing.assert_allclose(outcome.probabilities, outcome.expected, atol=FORMS[form].tolerance)
    assert outcome.imported.activation == FORMS[form].activation
    assert outcome.imported.single == form.startswith("one ")
    assert outcome.logits.shape == outcome.expected.shape


def test_logits_of_several_labels_are_so_by_request(tmp_path: Path) -> None:
    export(network(), tmp_path / "model.onnx")
    imported = import_onnx(
        tmp_path / "model.onnx", PrepareOptions(preprocess="imagenet", activation="sigmoid")
    )
    images = pixels(3)
    with torch.no_grad():
        expected = plain(normalised(images, imported)).sigmoid().numpy()
    np.testing.assert_allclose(run_engine(imported, tmp_path, images)[1], expected, atol=1e-3)


@pytest.mark.parametrize(
    "form", ["Constant nodes", "NHWC", "float16", "IR 3, opset 7", "BGR", "grey", "weights of 8 bits"]
)
def test_quantisation_sees_weights_whatever_the_form(form: str, tmp_path: Path) -> None:
    from builder.prepare.int8 import convert_to_int8

    FORMS[form].write(tmp_path / "model.onnx")
    imported = import_onnx(tmp_path / "model.onnx", FORMS[form].wanted)
    export_imported(imported, tmp_path / "master.onnx")
    convert_to_int8(tmp_path / "master.onnx", tmp_path / "int8.onnx", pixels(8), method="max", rest="fp32")
    assert int8_share(onnx.load(str(tmp_path / "int8.onnx"))) > 0.95
    assert imported.macs == 8 * 8 * WIDTH * (27 + 9 * WIDTH) + WIDTH * CLASSES


def test_transpositions_and_a_normalisation_between_convolutions_become_part_of_them(tmp_path: Path) -> None:
    FORMS["NHWC throughout"].write(tmp_path / "model.onnx")
    graph = import_onnx(tmp_path / "model.onnx", WANTED).model.graph
    assert {node.op_type for node in graph.node} <= {"Conv", "Relu", "Add", "Gemm", *SHAPES}
    assert sum(node.op_type == "Add" for node in graph.node) == 1  # the residual sum


def node(kind: str, *, domain: str = "", output: str = "odd", **attributes: object) -> onnx.ModelProto:
    """A network with such a node in it."""
    graph = helper.make_graph(
        [
            helper.make_node(kind, ["input"], [output], "users/own_name", domain=domain, **attributes),
            helper.make_node("GlobalAveragePool", [output], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["output"]),
        ],
        "odd",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_what_no_target_can_run_is_said_of_the_users_own_node(tmp_path: Path) -> None:
    onnx.save(node("QuickGelu", domain="com.microsoft", alpha=1.0), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"node 'users/own_name' \(QuickGelu\)") as caught:
        import_onnx(tmp_path / "model.onnx", WANTED)
    assert "TensorRT" not in str(caught.value)


def test_a_network_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    model = node("Relu")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "scale"))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["input", "scale"], ["q"], "quantise"))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "scale"], ["dq"], "dequantise"))
    model.graph.node[2].input[0] = "dq"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"node 'quantise' \(QuantizeLinear\).*give the network in floats"):
        import_onnx(tmp_path / "model.onnx", WANTED)


@pytest.mark.parametrize("location", ["../weights.bin", "/weights.bin"])
def test_weights_outside_of_the_models_folder_are_not_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    external(folder / "model.onnx")
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location if location[0] == "." else str(tmp_path / "weights.bin")
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ExportError, match="is not a valid ONNX model"):
        import_onnx(folder / "model.onnx", WANTED)


def test_scores_of_a_sequence_are_no_classes(tmp_path: Path) -> None:
    export(Tail(network(), lambda y: y[:, None].expand(-1, 4, -1)), tmp_path / "model.onnx")
    with pytest.raises(
        ExportError, match=r"gives \(1, 4, 5\) for 1 images; a classifier gives \(N, classes\)"
    ):
        import_onnx(tmp_path / "model.onnx", WANTED)


def test_two_questions_side_by_side_are_not_taken_for_one(tmp_path: Path) -> None:
    """Five probabilities that add up to two would be served as one label of five, each half as likely."""
    export(
        Tail(network(), lambda y: torch.cat([(y[:, :2] / 9).softmax(1), (y[:, 2:] / 9).softmax(1)], 1)),
        tmp_path / "model.onnx",
    )
    with pytest.raises(ExportError, match=r"more than one question: the first 2 of 5 .* --output-name"):
        import_onnx(tmp_path / "model.onnx", WANTED)


def test_a_measurement_is_not_taken_for_a_logit_where_no_labels_would_tell(tmp_path: Path) -> None:
    export(Tail(network(classes=1), lambda y: 40 + 30 * y.sigmoid()), tmp_path / "model.onnx")
    for number in range(16):
        Image.new("RGB", (32, 32), (16 * number,) * 3).save(tmp_path / f"{number}.png")
    unlabelled = WANTED.model_copy(update={"data": str(tmp_path), "unlabelled": True})
    with pytest.raises(ExportError, match=r"its one score is from \d+\.?\d* to \d+\.?\d* for every image"):
        open_onnx(tmp_path / "model.onnx", unlabelled)
    asked = unlabelled.model_copy(update={"activation": "softmax"})
    assert len(open_onnx(tmp_path / "model.onnx", asked).student.labels) == 2


def test_sizes_that_are_open_are_asked_for(tmp_path: Path) -> None:
    open_sizes(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"any size, \(batch_size, .*say which with --image-size"):
        import_onnx(tmp_path / "model.onnx", WANTED)
    nhwc(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"takes images of 16x16, not 32x32; leave out --image-size"):
        import_onnx(tmp_path / "model.onnx", PrepareOptions(preprocess="imagenet", image_size="32"))


def test_a_normalisation_of_pixels_that_are_taken_as_they_are_is_refused(tmp_path: Path) -> None:
    pixels_in(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="takes pixels as they are, uint8; leave out --preprocess"):
        import_onnx(tmp_path / "model.onnx", WANTED)


def test_an_int8_graph_whose_layers_are_floats_has_a_low_share(tmp_path: Path) -> None:
    export(network(), tmp_path / "model.onnx")
    export_imported(import_onnx(tmp_path / "model.onnx", WANTED), tmp_path / "master.onnx")
    assert int8_share(onnx.load(str(tmp_path / "master.onnx"))) == 0
