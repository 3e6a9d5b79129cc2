from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from builder.prepare.export import (
    ExportError,
    add_pixels_input,
    export_onnx,
    random_pixels,
    require_same,
    run_onnx,
)
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import open_checkpoint, prepare
from models.checkpoint import load_checkpoint
from models.datasets import DataSplit
from models.evaluation import predict_logits
from models.preprocessing import Preprocessing

SPEC = Preprocessing(resize=8, height=8, width=8)


@pytest.fixture(scope="module")
def master(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "fp32.onnx"
    network, card = load_checkpoint(checkpoint)
    export_onnx(network, card.preprocessing, path)
    return path


def test_graph_takes_what_preprocessing_gives_and_computes_what_pytorch_computes(
    master: Path, checkpoint: Path, data: DataSplit
) -> None:
    network, card = load_checkpoint(checkpoint)
    pixels = data.validation.load_pixels(card.preprocessing)[:20]

    logits = run_onnx(master, pixels)

    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(logits, predict_logits(network, pixels, card.preprocessing).numpy(), atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 33])
def test_batch_is_dynamic(master: Path, count: int) -> None:
    assert run_onnx(master, np.zeros((count, 24, 24, 3), np.uint8)).shape == (count, 10)


def test_only_a_cast_touches_the_uint8_pixels(master: Path) -> None:
    graph = onnx.load(master).graph
    (pixels,) = graph.input

    users = [node for node in graph.node if pixels.name in node.input]

    assert pixels.type.tensor_type.elem_type == TensorProto.UINT8
    assert [(user.name, user.op_type) for user in users] == [("pre/cast", "Cast")]


def test_graph_is_one_that_jetpack_6_reads(master: Path) -> None:
    model = onnx.load(master)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]


def test_graph_tells_nothing_of_the_machine_that_exported_it(master: Path) -> None:
    assert str(Path(torch.__file__).parents[2]).encode() not in master.read_bytes()


def test_probabilities_are_the_softmax_of_the_logits(master: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(master), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"images": pixels})

    expected = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


class _Noisy(nn.Module):
    """Computes something else each time, as a dropout that ignores evaluation mode does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) + torch.rand(images.shape[0], 3)


class _TwoHeads(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.mean(dim=(2, 3)), images.amax(dim=(2, 3))


def test_network_that_the_graph_does_not_reproduce_is_refused(tmp_path: Path) -> None:
    network = _Noisy()
    network.weight = nn.Parameter(torch.zeros(1))
    export_onnx(network, SPEC, tmp_path / "noisy.onnx")
    pixels = random_pixels(SPEC, 3)
    with pytest.raises(ExportError, match="more than rounding explains"):
        require_same(tmp_path / "noisy.onnx", pixels, predict_logits(network, pixels, SPEC).numpy())


def test_the_export_is_held_against_the_network_on_the_users_images(checkpoint: Path, tmp_path: Path) -> None:
    subject = open_checkpoint(checkpoint, None)
    network, card = load_checkpoint(checkpoint)
    with torch.no_grad():
        network.get_parameter("fc.bias")[3] += 0.1
    other = replace(subject, export=lambda master: export_onnx(network, card.preprocessing, master))
    with pytest.raises(ExportError, match="more than rounding explains"):
        prepare(other, tmp_path, PrepareOptions(verification_images=64), lambda line: None)


def test_network_with_two_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="needs one input and one output"):
        export_onnx(_TwoHeads(), SPEC, tmp_path / "two.onnx")


def test_names_of_the_network_do_not_clash_with_ours() -> None:
    """A network whose input is called `images` too, and whose output is called `probabilities`."""
    shape = ["batch", 3, 8, 8]
    mean = onnx.helper.make_node("GlobalAveragePool", ["images"], ["logits"])
    flat = onnx.helper.make_node("Flatten", ["logits"], ["probabilities"])
    graph = onnx.helper.make_graph(
        [mean, flat],
        "clash",
        [onnx.helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])

    model = add_pixels_input(model, SPEC)

    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == ["logits", "probabilities"]
