"""The forms: how each file is written, and what its network gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data
from torch import nn

from builder.prepare.export import quiet
from builder.prepare.options import PrepareOptions
from experiments.onnx_forms.small_networks import (
    CLASSES,
    SIDE,
    ChannelsLast,
    Function,
    Pooled,
    Tail,
    Token,
    Two,
    Windows,
    export,
    network,
    padded,
)
from runtime.manifest import Activation

WANTED: Final = PrepareOptions(preprocess="imagenet")


@dataclass(frozen=True)
class Form:
    """One way to write a classifier.

    Attributes:
        write: the file.
        expected: logits that its network gives for normalised NCHW images of three channels.
        told: who writes so, or what it is.
        wanted: options that it needs.
        activation: makes probabilities of the logits.
        tolerance: of a probability.
    """

    write: Callable[[Path], object]
    expected: Callable[[torch.Tensor], torch.Tensor]
    told: str
    wanted: PrepareOptions = WANTED
    activation: Activation = "softmax"
    tolerance: float = 2e-3


def plain(x: torch.Tensor) -> torch.Tensor:
    """Logits."""
    logits: torch.Tensor = network()(x)
    return logits


def of_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """Logits, with weights of eight bits."""
    rounded = network()
    for weights in (rounded.first.weight, rounded.second.weight, rounded.last.weight):
        scale = weights.data.abs().flatten(1).amax(1).reshape(-1, *[1] * (weights.ndim - 1)) / 127
        weights.data = (weights.data / scale).round() * scale
    logits: torch.Tensor = rounded(x)
    return logits


def nhwc(path: Path) -> None:
    """As tf2onnx does: transposed before the first convolution."""
    module = Tail(network(), lambda y: y, lambda x: x.permute(0, 3, 1, 2))
    export(module, path, example=torch.zeros(1, SIDE, SIDE, 3))


def channels_last(path: Path) -> None:
    """NHWC from layer to layer, as converters leave it that do not optimise."""
    module = ChannelsLast()
    module.load_state_dict(network().state_dict())
    export(module.eval(), path, example=torch.zeros(1, SIDE, SIDE, 3))


def grey(path: Path) -> None:
    """One channel."""
    export(network(channels=1), path, example=torch.zeros(1, 1, SIDE, SIDE))


def luma(x: torch.Tensor) -> torch.Tensor:
    """As Pillow makes grey images."""
    grey = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    logits: torch.Tensor = network(channels=1)(grey)
    return logits


def grey_of_three_dimensions(path: Path) -> None:
    """As Keras' tutorials on MNIST do."""
    module = Tail(network(channels=1), lambda y: y, lambda x: x[:, None])
    export(module, path, example=torch.zeros(1, SIDE, SIDE))


def grey_padded(path: Path) -> None:
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


def ending(function: Function, *, fixed: bool = False) -> Callable[[Path], object]:
    """The network with something behind it."""
    return lambda path: export(Tail(network(), function), path, fixed=fixed)


def one_score(shape: tuple[int, ...], *, activated: bool) -> Callable[[Path], object]:
    """A network of one score, of that shape."""

    def end(y: torch.Tensor) -> torch.Tensor:
        return (y.sigmoid() if activated else y).reshape(shape)

    return lambda path: export(Tail(network(classes=1), end), path)


def second_of_two(x: torch.Tensor) -> torch.Tensor:
    """Logits of two classes, of which the network scores the second."""
    score = network(classes=1)(x)
    return torch.cat([torch.zeros_like(score), score], 1)


def _plainly(*, fixed: bool = False, opset: int = 17) -> Callable[[Path], object]:
    return lambda path: export(network(), path, fixed=fixed, opset=opset)


def _swapped(x: torch.Tensor) -> torch.Tensor:
    return plain(x[:, [2, 1, 0]])


def _stable_softmax(y: torch.Tensor) -> torch.Tensor:
    shifted = (y - y.amax(1, keepdim=True)).exp()
    return shifted / shifted.sum(1, keepdim=True)


FORMS: Final[Mapping[str, Form]] = {
    "NCHW, any batch": Form(_plainly(), plain, "PyTorch; BatchNorm unfolded"),
    "batch of 1": Form(_plainly(fixed=True), plain, "PyTorch without dynamic axes"),
    "batch of 4": Form(
        lambda path: export(network(), path, example=torch.zeros(4, 3, SIDE, SIDE), fixed=True),
        plain,
        "the same",
    ),
    "batch of 1 in shapes": Form(
        ending(lambda y: y.reshape(1, 1, CLASSES).reshape(1, CLASSES), fixed=True),
        plain,
        "Reshape to (1, 1, C)",
    ),
    "batch of 1, attention": Form(
        lambda path: export(Token().eval(), path, fixed=True), lambda x: Token().eval()(x), "ViT, class token"
    ),
    "batch of 1, windows": Form(
        lambda path: export(Windows().eval(), path, fixed=True), lambda x: Windows().eval()(x), "Swin, MaxViT"
    ),
    "NHWC": Form(nhwc, plain, "tf2onnx, Keras"),
    "NHWC throughout": Form(channels_last, plain, "TensorFlow; normalised by Sub, Mul, Add"),
    "grey": Form(grey, luma, "one channel"),
    "grey, three dimensions": Form(grey_of_three_dimensions, luma, "Keras' tutorials: (N, H, W)"),
    "grey, padded": Form(grey_padded, luma, "Keras' `same`: Pad before the convolution"),
    "padded by size": Form(
        lambda path: export(padded(), path),
        lambda x: padded()(x),
        "TensorFlow's `same` in PyTorch: computed from Shape",
    ),
    "BGR": Form(_plainly(), _swapped, "Caffe, OpenCV", PrepareOptions(preprocess="caffe")),
    "BGR, NHWC": Form(nhwc, _swapped, "Keras' ResNet and VGG", PrepareOptions(preprocess="caffe")),
    "float16": Form(half, plain, "`model.half()`", tolerance=0.02),
    "uint8 pixels": Form(
        pixels_in, lambda x: network()((x / 255 - 0.45) / 0.22), "normalised in the graph", PrepareOptions()
    ),
    "IR 3, opset 7": Form(lambda path: old(path, 7), plain, "MXNet, the model zoo: weights are inputs"),
    "IR 3, opset 8": Form(lambda path: old(path, 8), plain, "the same"),
    "opset 20": Form(_plainly(opset=20), plain, "PyTorch"),
    "Constant nodes": Form(constants, plain, "Paddle: weights behind Identity"),
    "external data": Form(external, plain, "weights in a file beside it"),
    "weights of 8 bits": Form(weights_of_eight_bits, of_eight_bits, "TFLite: unpacked by DequantizeLinear"),
    "open height and width": Form(
        open_sizes,
        plain,
        "Hugging Face; `--image-size`",
        PrepareOptions(preprocess="imagenet", image_size=str(SIDE)),
    ),
    "two outputs": Form(
        two_outputs, plain, "`--output-name`", PrepareOptions(preprocess="imagenet", output_name="scores")
    ),
    "dynamo": Form(dynamo, plain, "PyTorch's newer exporter"),
    "dynamo, pooled": Form(dynamo_pooled, plain, "the same, adaptive pooling"),
    "dynamo, attention": Form(dynamo_token, lambda x: Token().eval()(x), "the same, of a batch of 1"),
    "(N, C, 1, 1)": Form(ending(lambda y: y[:, :, None, None]), plain, "fully convolutional"),
    "(N, 1, 1, C)": Form(ending(lambda y: y[:, None, None]), plain, "the same, NHWC"),
    "softmax": Form(ending(lambda y: y.softmax(1)), plain, "tf2onnx, Keras, Paddle"),
    "softmax, then Mul": Form(
        ending(lambda y: nn.Identity()(y.softmax(1)) * 1), plain, "something behind it"
    ),
    "softmax in float16": Form(
        ending(lambda y: y.half().softmax(1).float()), plain, "mixed precision", tolerance=0.02
    ),
    "softmax, then Reshape": Form(
        ending(lambda y: y.softmax(1).reshape(-1, CLASSES, 1).squeeze(2)), plain, "shapes behind it"
    ),
    "exp, sum, div": Form(
        ending(lambda y: y.exp() / y.exp().sum(1, keepdim=True)), plain, "softmax spelled out"
    ),
    "max, exp, sum, div": Form(ending(_stable_softmax), plain, "the same, stable"),
    "softmax twice": Form(
        ending(lambda y: y.softmax(1).softmax(1)), lambda x: plain(x).softmax(1), "by mistake"
    ),
    "percentages": Form(ending(lambda y: y.softmax(1) * 100), plain, "rows add up to 100"),
    "log-softmax": Form(ending(lambda y: y.log_softmax(1)), plain, "trained with NLLLoss"),
    "mean of two softmaxes": Form(
        ending(lambda y: (y.softmax(1) + (y * 2).softmax(1)) / 2),
        lambda x: ((plain(x).softmax(1) + (plain(x) * 2).softmax(1)) / 2).log(),
        "ensembles",
    ),
    "sigmoid": Form(ending(torch.sigmoid), plain, "any number of labels", activation="sigmoid"),
    "sigmoid, (N, C, 1, 1)": Form(
        ending(lambda y: y.sigmoid()[:, :, None, None]), plain, "the same", activation="sigmoid"
    ),
    "1 / (1 + exp)": Form(ending(lambda y: 1 / (1 + (-y).exp())), plain, "spelled out", activation="sigmoid"),
    "exp of softplus": Form(
        ending(lambda y: nn.functional.softplus(-y).neg().exp()),
        plain,
        "known by its values",
        activation="sigmoid",
    ),
    **{
        f"one {kind}, {told}": Form(
            one_score(shape, activated=kind == "sigmoid"), second_of_two, "two classes"
        )
        for kind in ("logit", "sigmoid")
        for told, shape in {"(N, 1)": (-1, 1), "(N)": (-1,), "(N, 1, 1, 1)": (-1, 1, 1, 1)}.items()
    },
}
