"""Every form that exporters give a classifier becomes an engine that gives what the file gives.

One small convolutional network, whose outputs are computed here by PyTorch, is written in each form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data
from torch import nn

from builder.kit import INPUT, LOGITS, PROBABILITIES
from builder.prepare.export import ExportError, quiet
from builder.prepare.import_onnx import ImportedModel, export_imported, import_onnx
from builder.prepare.mac_share import int8_share
from builder.prepare.options import PrepareOptions
from models.preprocessing import Pixels

SIDE, WIDTH, CLASSES = 16, 32, 5
WANTED = PrepareOptions(preprocess="imagenet")


class Network(nn.Module):
    """Convolutions, a normalisation, a residual sum, and a linear layer."""

    def __init__(self, channels: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, WIDTH, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        self.last = nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        return self.last(x.mean((2, 3)))


def network(channels: int = 3, classes: int = CLASSES) -> Network:
    """With statistics and weights far from those of an untrained one."""
    torch.manual_seed(3)
    made = Network(channels, classes)
    nn.init.uniform_(made.norm.running_mean, -1, 1)
    nn.init.uniform_(made.norm.running_var, 0.5, 2)
    nn.init.uniform_(made.norm.weight, 0.5, 2)
    nn.init.normal_(made.last.weight, std=3)
    return made.eval()


def export(
    module: nn.Module,
    path: Path,
    *,
    example: torch.Tensor | None = None,
    opset: int = 17,
    fixed: bool = False,
) -> onnx.ModelProto:
    """The module, as PyTorch's older exporter writes it."""
    if example is None:
        example = torch.zeros(1, 3, SIDE, SIDE)
    axes = None if fixed else {"input": {0: "n"}, "output": {0: "n"}}
    with quiet():
        torch.onnx.export(
            module,
            (example,),
            str(path),
            dynamo=False,
            opset_version=opset,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=axes,
        )
    return onnx.load(str(path))


@dataclass(frozen=True)
class Form:
    """How a file is written, and what its network gives for normalised NCHW images of three channels."""

    write: Callable[[Path], None]
    expected: Callable[[torch.Tensor], torch.Tensor]
    wanted: PrepareOptions = WANTED


class Tail(nn.Module):
    """The network, and something before or behind it."""

    def __init__(
        self, inner: nn.Module, tail: Callable[[torch.Tensor], torch.Tensor], head: Callable | None = None
    ) -> None:
        super().__init__()
        self.inner, self.tail, self.head = inner, tail, head or (lambda x: x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All three."""
        return self.tail(self.inner(self.head(x)))


def plain(x: torch.Tensor) -> torch.Tensor:
    """Logits."""
    return network()(x)


def of_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """Logits, with weights of eight bits."""
    rounded = network()
    for weights in (rounded.first.weight, rounded.second.weight, rounded.last.weight):
        scale = weights.data.abs().flatten(1).amax(1).reshape(-1, *[1] * (weights.ndim - 1)) / 127
        weights.data = (weights.data / scale).round() * scale
    return rounded(x)


def nhwc(path: Path) -> None:
    """As tf2onnx does: transposed before the first convolution."""
    module = Tail(network(), lambda y: y, lambda x: x.permute(0, 3, 1, 2))
    export(module, path, example=torch.zeros(1, SIDE, SIDE, 3))


def grey(path: Path) -> None:
    """One channel."""
    export(network(channels=1), path, example=torch.zeros(1, 1, SIDE, SIDE))


def luma(x: torch.Tensor) -> torch.Tensor:
    """As Pillow makes grey images."""
    return network(channels=1)((x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True))


def grey_of_three_dimensions(path: Path) -> None:
    """As Keras' tutorials on MNIST do."""
    module = Tail(network(channels=1), lambda y: y, lambda x: x[:, None])
    export(module, path, example=torch.zeros(1, SIDE, SIDE))


def padded(path: Path) -> None:
    """Padding of its own before a convolution of one channel, as Keras' `same` becomes."""
    inner = network(channels=1)
    inner.first.padding = (0, 0)
    module = Tail(inner, lambda y: y, lambda x: nn.functional.pad(x, (1, 1, 1, 1)))
    export(module, path, example=torch.zeros(1, 1, SIDE, SIDE))


def half(path: Path) -> None:
    """FP16 from the input to the output."""
    export(network().half(), path, example=torch.zeros(1, 3, SIDE, SIDE).half())


def pixels_in(path: Path) -> None:
    """`uint8` NHWC, normalised by the graph itself."""

    def head(x: torch.Tensor) -> torch.Tensor:
        return (x.permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.22

    example = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    export(Tail(network(), lambda y: y, head), path, example=example)


def old(path: Path, opset: int) -> None:
    """IR version 3, weights among the inputs: PyTorch 1.0, MXNet, the model zoo."""
    model = export(network(), path, opset=9)
    model.opset_import[0].version = opset
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
    )
    onnx.save(model, path)


def constants(path: Path) -> None:
    """Weights in Constant nodes, behind Identity: Paddle."""
    model = export(network(), path)
    graph = model.graph
    nodes = []
    for tensor in graph.initializer:
        nodes.append(helper.make_node("Constant", [], [f"{tensor.name}_kept"], value=tensor))
        nodes.append(helper.make_node("Identity", [f"{tensor.name}_kept"], [tensor.name]))
    nodes += list(graph.node)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def weights_of_eight_bits(path: Path) -> None:
    """Weights in eight bits, unpacked by DequantizeLinear: tf2onnx, of TFLite files."""
    model = export(network(), path)
    graph = model.graph
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.ndim < 2:
            continue
        scale = np.abs(values).max(axis=tuple(range(1, values.ndim))) / 127
        quantised = np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        graph.initializer.remove(tensor)
        for name, array in (("q", quantised), ("s", scale), ("z", np.zeros(len(scale), np.int8))):
            graph.initializer.append(numpy_helper.from_array(array, f"{tensor.name}_{name}"))
        inputs = [f"{tensor.name}_{name}" for name in "qsz"]
        graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [tensor.name], axis=0))
    onnx.save(model, path)


def external(path: Path) -> None:
    """Weights in a file beside it."""
    model = export(network(), path)
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, path)


def open_sizes(path: Path) -> None:
    """Every dimension open, as Hugging Face's exporter leaves them."""
    model = export(network(), path)
    for place, name in enumerate(("batch_size", "num_channels", "height", "width")):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name
    onnx.save(model, path)


class Two(nn.Module):
    """Logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both."""
        return self.inner.first(x).mean((2, 3)), self.inner(x)


def two_outputs(path: Path) -> None:
    """The scores are the second."""
    with quiet():
        torch.onnx.export(
            Two().eval(),
            (torch.zeros(1, 3, SIDE, SIDE),),
            str(path),
            dynamo=False,
            output_names=["f", "scores"],
        )


class Pooled(Network):
    """The same, with the layer that PyTorch's exporter flattens a whole batch for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        return self.last(nn.AdaptiveAvgPool2d(1)(x).flatten(1))


def dynamo_pooled(path: Path) -> None:
    """PyTorch's newer exporter, of a fixed batch, with a pooling layer."""
    module = Pooled()
    module.load_state_dict(network().state_dict())
    with quiet():
        torch.onnx.export(module.eval(), (torch.zeros(1, 3, SIDE, SIDE),), str(path), dynamo=True)


def dynamo_token(path: Path) -> None:
    """The same exporter, of attention."""
    with quiet():
        torch.onnx.export(Token().eval(), (torch.zeros(1, 3, SIDE, SIDE),), str(path), dynamo=True)


def dynamo(path: Path) -> None:
    """PyTorch's newer exporter, of a fixed batch."""
    with quiet():
        torch.onnx.export(network(), (torch.zeros(1, 3, SIDE, SIDE),), str(path), dynamo=True)


def tail(function: Callable[[torch.Tensor], torch.Tensor], *, fixed: bool = False) -> Callable[[Path], None]:
    return lambda path: export(Tail(network(), function), path, fixed=fixed) and None


class Token(nn.Module):
    """Patches with a class token and attention, whose sizes are those of the export."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.qkv = nn.Linear(8, 24)
        self.last = nn.Linear(8, CLASSES)
        nn.init.normal_(self.last.weight, std=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        count = x.shape[0]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(count, -1, -1), x], 1)
        q, k, v = self.qkv(x).reshape(count, x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + attention.transpose(1, 2).reshape(count, x.shape[1], 8)
        return self.last(x[:, 0])


FORMS = {
    "nchw": Form(lambda path: export(network(), path) and None, plain),
    "batch of one": Form(lambda path: export(network(), path, fixed=True) and None, plain),
    "batch of four": Form(
        lambda path: export(network(), path, example=torch.zeros(4, 3, SIDE, SIDE), fixed=True) and None,
        plain,
    ),
    "fixed reshape": Form(tail(lambda y: y.reshape(1, 1, CLASSES).reshape(1, CLASSES), fixed=True), plain),
    "class token of one image": Form(
        lambda path: export(Token().eval(), path, fixed=True) and None, lambda x: Token().eval()(x)
    ),
    "nhwc": Form(nhwc, plain),
    "grey": Form(grey, luma),
    "grey of three dimensions": Form(grey_of_three_dimensions, luma),
    "grey, padded": Form(padded, luma),
    "bgr": Form(
        lambda path: export(network(), path) and None,
        lambda x: network()(x[:, [2, 1, 0]]),
        PrepareOptions(preprocess="caffe"),
    ),
    "bgr nhwc": Form(nhwc, lambda x: network()(x[:, [2, 1, 0]]), PrepareOptions(preprocess="caffe")),
    "half": Form(half, plain),
    "pixels": Form(pixels_in, lambda x: network()((x / 255 - 0.45) / 0.22), PrepareOptions()),
    "ir 3, opset 7": Form(lambda path: old(path, 7), plain),
    "ir 3, opset 8": Form(lambda path: old(path, 8), plain),
    "newest opset": Form(lambda path: export(network(), path, opset=20) and None, plain),
    "constant nodes": Form(constants, plain),
    "external data": Form(external, plain),
    "weights of eight bits": Form(weights_of_eight_bits, of_eight_bits),
    "open sizes": Form(open_sizes, plain, PrepareOptions(preprocess="imagenet", image_size=str(SIDE))),
    "two outputs": Form(two_outputs, plain, PrepareOptions(preprocess="imagenet", output_name="scores")),
    "dynamo": Form(dynamo, plain),
    "dynamo, pooled": Form(dynamo_pooled, plain),
    "dynamo, class token": Form(dynamo_token, lambda x: Token().eval()(x)),
    "n c 1 1": Form(tail(lambda y: y[:, :, None, None]), plain),
    "n 1 1 c": Form(tail(lambda y: y[:, None, None]), plain),
    "softmax": Form(tail(lambda y: y.softmax(1)), plain),
    "softmax, identity": Form(tail(lambda y: nn.Identity()(y.softmax(1)) * 1), plain),
    "softmax in half": Form(tail(lambda y: y.half().softmax(1).float()), plain),
    "softmax, reshape": Form(tail(lambda y: y.softmax(1).reshape(-1, CLASSES, 1).squeeze(2)), plain),
    "exp, sum, div": Form(tail(lambda y: y.exp() / y.exp().sum(1, keepdim=True)), plain),
    "stable exp, sum, div": Form(
        tail(lambda y: (lambda e: e / e.sum(1, keepdim=True))((y - y.amax(1, keepdim=True)).exp())), plain
    ),
    "softmax twice": Form(tail(lambda y: y.softmax(1).softmax(1)), lambda x: plain(x).softmax(1)),
    "percentages": Form(tail(lambda y: y.softmax(1) * 100), plain),
    "log-softmax": Form(tail(lambda y: y.log_softmax(1)), plain),
    "mean of two softmaxes": Form(
        tail(lambda y: (y.softmax(1) + (y * 2).softmax(1)) / 2),
        lambda x: ((plain(x).softmax(1) + (plain(x) * 2).softmax(1)) / 2).log(),
    ),
}


def pixels(count: int) -> Pixels:
    return np.random.default_rng(5).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def normalised(images: Pixels, imported: ImportedModel) -> torch.Tensor:
    spec = imported.preprocessing
    order = [2, 1, 0] if spec.channels == "BGR" else [0, 1, 2]
    mean, std = (torch.tensor(values)[order][:, None, None] for values in (spec.mean, spec.std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def run_engine(imported: ImportedModel, folder: Path, images: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Logits and probabilities of the master graph, compiled by OpenVINO."""
    import openvino

    path = folder / "master.onnx"
    export_imported(imported, path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled({INPUT: images})
    return result[LOGITS], result[PROBABILITIES]


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_of_any_form_gives_the_probabilities_of_the_network(form: str, tmp_path: Path) -> None:
    written = FORMS[form]
    written.write(tmp_path / "model.onnx")
    imported = import_onnx(tmp_path / "model.onnx", written.wanted, lambda _: pixels(8))
    images = pixels(7)
    with torch.no_grad():
        expected = written.expected(normalised(images, imported)).softmax(1).numpy()
    assert (np.ptp(expected, axis=1) > 0.1).all()  # so that the order of classes matters

    logits, probabilities = run_engine(imported, tmp_path, images)

    np.testing.assert_allclose(probabilities, expected, atol=0.02 if "half" in form else 2e-3)
    assert logits.shape == (7, CLASSES)
    assert imported.activation == "softmax"


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        lambda y: y.sigmoid()[:, :, None, None],
        lambda y: 1 / (1 + (-y).exp()),
        lambda y: nn.functional.softplus(-y).neg().exp(),
    ],
    ids=["sigmoid", "sigmoid of four dimensions", "spelled out", "spelled in another way"],
)
def test_several_labels_of_one_image_have_probabilities_of_their_own(
    function: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    export(Tail(network(), function), tmp_path / "model.onnx")
    imported = import_onnx(tmp_path / "model.onnx", WANTED, lambda _: pixels(8))
    images = pixels(7)
    with torch.no_grad():
        expected = plain(normalised(images, imported)).sigmoid().numpy()
    logits, probabilities = run_engine(imported, tmp_path, images)
    assert imported.activation == "sigmoid"
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)
    np.testing.assert_array_equal(logits > 0, expected > 0.5)


def test_logits_of_several_labels_are_so_by_request(tmp_path: Path) -> None:
    export(network(), tmp_path / "model.onnx")
    imported = import_onnx(
        tmp_path / "model.onnx", PrepareOptions(preprocess="imagenet", activation="sigmoid")
    )
    images = pixels(3)
    with torch.no_grad():
        expected = plain(normalised(images, imported)).sigmoid().numpy()
    np.testing.assert_allclose(run_engine(imported, tmp_path, images)[1], expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(-1, 1), (-1,), (-1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("activated", [False, True], ids=["logit", "sigmoid"])
def test_one_logit_is_the_second_of_two_classes(
    activated: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    def end(y: torch.Tensor) -> torch.Tensor:
        return (y.sigmoid() if activated else y).reshape(shape)

    export(Tail(network(classes=1), end), tmp_path / "model.onnx")
    imported = import_onnx(tmp_path / "model.onnx", WANTED, lambda _: pixels(8))
    images = pixels(7)
    with torch.no_grad():
        expected = network(classes=1)(normalised(images, imported)).sigmoid().numpy()
    probabilities = run_engine(imported, tmp_path, images)[1]
    np.testing.assert_allclose(probabilities, np.concatenate([1 - expected, expected], axis=1), atol=1e-3)
    assert (imported.classes, imported.single) == (2, True)


@pytest.mark.parametrize("form", ["constant nodes", "nhwc", "half", "ir 3, opset 7", "bgr", "grey"])
def test_quantisation_sees_weights_whatever_the_form(form: str, tmp_path: Path) -> None:
    from builder.prepare.int8 import convert_to_int8

    FORMS[form].write(tmp_path / "model.onnx")
    imported = import_onnx(tmp_path / "model.onnx", FORMS[form].wanted)
    export_imported(imported, tmp_path / "master.onnx")
    convert_to_int8(tmp_path / "master.onnx", tmp_path / "int8.onnx", pixels(8), method="max", rest="fp32")
    assert int8_share(onnx.load(str(tmp_path / "int8.onnx"))) > 0.95
    assert imported.macs == 8 * 8 * WIDTH * (27 + 9 * WIDTH) + WIDTH * CLASSES


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
