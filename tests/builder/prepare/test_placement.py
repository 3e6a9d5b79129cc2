"""INT8 graphs that leave out residual sums, or the first layer, for `--precision best` to compare."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest

from builder.kit import KitError, open_kit
from builder.prepare.legality import check_legality
from builder.prepare.options import PrepareOptions
from builder.prepare.placement import leave_out
from builder.prepare.preparation import open_checkpoint, prepare
from builder.prepare.qdq import constants_of, exact_logits, quantised_layers
from runtime.manifest import LeftOut
from trimrt.selftest.checks import KIT

PARTS = get_args(LeftOut)
RESTS = ("fp32", "fp16")


@pytest.fixture(params=RESTS)
def whole(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A small ResNet18 in INT8, with FP32 or FP16 between its quantised layers."""
    _, path = next(iter(open_kit(KIT).graphs("int8", request.param)))
    return onnx.load(path)


def quantised_sums(model: onnx.ModelProto) -> list[str]:
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Add" and "DequantizeLinear" in {made.get(name) for name in node.input}
    ]


def test_residual_sums_are_left_out_and_nothing_else(whole: onnx.ModelProto) -> None:
    changed = leave_out(whole, "residual sums")
    assert changed is not None
    assert quantised_sums(whole)
    assert not quantised_sums(changed)
    assert quantised_layers(changed).keys() == quantised_layers(whole).keys()


def test_the_first_layer_is_left_out_and_nothing_else(whole: onnx.ModelProto) -> None:
    changed = leave_out(whole, "first layer")
    assert changed is not None
    first, *others = quantised_layers(whole)
    assert list(quantised_layers(changed)) == others
    assert quantised_sums(changed) == quantised_sums(whole)
    node = next(node for node in changed.graph.node if node.name == first)
    layer = quantised_layers(whole)[first]
    assert node.input[0] == layer.activation


def test_the_first_layers_weights_stay_as_they_were_rounded(whole: onnx.ModelProto) -> None:
    """What was corrected or trained for that rounding stays right."""
    changed = leave_out(whole, "first layer")
    assert changed is not None
    first, layer = next(iter(quantised_layers(whole).items()))
    before, after = constants_of(whole), constants_of(changed)
    node = next(node for node in changed.graph.node if node.name == first)
    scale = before[layer.weights_scale]
    steps = after[node.input[1]].astype(np.float64) / scale.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(steps, before[layer.weights], atol=0.1)
    assert after[node.input[1]].dtype == scale.dtype


@pytest.mark.parametrize("part", PARTS)
def test_the_graph_is_legal_and_labels_as_before(whole: onnx.ModelProto, part: LeftOut) -> None:
    changed = leave_out(whole, part)
    assert changed is not None
    assert check_legality(changed).errors == []
    images = open_kit(KIT).verification
    assert images.compare(exact_logits(changed, images.pixels)).label_agreement >= 0.98


@pytest.mark.parametrize("part", PARTS)
def test_what_is_left_out_already_is_not_there_to_leave_out(whole: onnx.ModelProto, part: LeftOut) -> None:
    changed = leave_out(whole, part)
    assert changed is not None
    assert leave_out(changed, part) is None


def test_each_way_to_int8_has_its_graphs(checkpoint: Path, tmp_path: Path) -> None:
    subject = open_checkpoint(checkpoint, data=None)
    options = PrepareOptions(calibration_images=32, verification_images=64, calibration="max")
    preparation = prepare(subject, tmp_path, options, lambda _: None)
    whole, _ = next(preparation.graphs("int8", "fp16"))
    for part in PARTS:
        graph, path = next(preparation.graphs("int8", "fp16", part))
        assert graph.calibration is not None
        assert graph.calibration.name == f"max, {part} left out"
        assert graph.calibration.model_copy(update={"left_out": None}) == whole.calibration
        assert graph.file == path.name == f"int8-max-fp16-without-{part.replace(' ', '-')}.onnx"
        assert graph.exact == preparation.verification.compare(
            exact_logits(onnx.load(path), preparation.verification.pixels)
        )
        assert graph.int8_share is not None
        assert whole.int8_share is not None
        assert (graph.int8_share < whole.int8_share) == (part == "first layer")


def test_a_kit_without_such_graphs_says_so() -> None:
    with pytest.raises(KitError, match="has no int8 graph with the residual sums left out"):
        next(iter(open_kit(KIT).graphs("int8", "fp16", "residual sums")))
