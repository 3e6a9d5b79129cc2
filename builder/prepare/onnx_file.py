"""Reading an ONNX file: what its network takes and gives, and whether it is a kind that can be taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import ExportError, open_session
from builder.prepare.other_formats import told_instead

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET: Final = 7
_IR_VERSION: Final = 10  # the newest that TensorRT 10.3 reads
_LARGEST_WEIGHTS: Final = 1 << 31  # bytes that a file can have
_IMAGE_DIMENSIONS: Final = (3, 4)  # of a batch; grey images may have no dimension for channels

Layout = Literal["NCHW", "NHWC", "NHW"]
STANDARD_DOMAINS: Final = ("", "ai.onnx")
_QUANTISED: Final = (
    *("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"),
    *("MatMulInteger", "DynamicQuantizeLinear"),
)


@dataclass(frozen=True)
class Signature:
    """What the file's network takes.

    Attributes:
        input: its input's name.
        type: of the input, a NumPy dtype.
        layout: of the input.
        batch: fixed at export; None: any.
        channels: 1 or 3.
        height: of the images.
        width: of the images.
        output: the name of its scores.
    """

    input: str
    type: np.dtype[Any]
    layout: Layout
    batch: int | None
    channels: int
    height: int
    width: int
    output: str

    def arrange(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Normalised float32 NCHW `images` of the network's own channels, as its input takes them."""
        if self.layout == "NHWC":
            images = images.transpose(0, 2, 3, 1)
        elif self.layout == "NHW":
            images = images[:, 0]
        if np.issubdtype(self.type, np.integer):
            images = np.rint(images)
        return np.ascontiguousarray(images.astype(self.type))


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file, with its weights; those in other files must be in its folder.

    Raises:
        ExportError: not ONNX, or of an old version.
    """
    import onnx

    if instead := told_instead(path):
        raise ExportError(f"{path} {instead}")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf, the checker and the loader of weights raise types of their own
        raise ExportError(f"{path} is not a valid ONNX model: {first_line(error)}") from error
    _require_valid(path, model)
    version = opset_of(model)
    if version < OLDEST_OPSET:
        raise ExportError(f"{path} is of opset {version}; export it with {OLDEST_OPSET} or newer")
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    _fill_sparse_weights(model)
    _weights_are_constants(model)
    _dequantise_weights(model)
    return model


def _require_valid(path: Path, model: onnx.ModelProto) -> None:
    """Refuse what neither onnx nor ONNX Runtime takes; either may not know the other's newest version."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker raises types of its own
        try:
            open_session(str(path))
        except Exception:  # so does onnxruntime
            raise ExportError(f"{path} is not a valid ONNX model: {first_line(error)}") from error
    if not (model.graph.node and model.graph.output):
        raise ExportError(f"{path} is not a valid ONNX model: it computes nothing")


def _is_training(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it normalises by the batch that it sees, or drops values."""
    from onnx import numpy_helper

    if node.op_type == "BatchNormalization":
        return any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
    mode = constants.get(node.input[2]) if node.op_type == "Dropout" and len(node.input) > 2 else None
    return mode is not None and bool(numpy_helper.to_array(mode).any())


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 1)


def describe(node: onnx.NodeProto) -> str:
    """A node as the user's own tools show it."""
    return f"node {node.name or node.output[0]!r} ({node.op_type})"


def _runtime(node: onnx.NodeProto) -> str:
    return "ONNX Runtime" if "microsoft" in node.domain else "some runtime"


def choose_output(path: Path, model: onnx.ModelProto, asked: str | None) -> str:
    """The output that holds the scores; all others are taken away, with what only they need.

    Raises:
        ExportError: there are several and none was asked for, or not the one that was; or what it is made by
            cannot be taken.
    """
    from onnx import TensorProto

    outputs = {value.name: value for value in model.graph.output}
    if asked is None and len(outputs) > 1:
        told = ", ".join(f"{name} {_shape(value)}" for name, value in outputs.items())
        raise ExportError(f"{path} has {len(outputs)} outputs: {told}; name its scores with --output-name")
    name = asked or next(iter(outputs))
    if name not in outputs:
        raise ExportError(f"{path} has no output {name!r}; it has {', '.join(outputs)}")
    kept = outputs[name]
    decisions = (TensorProto.INT32, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL)
    if not kept.type.HasField("tensor_type") or kept.type.tensor_type.elem_type in decisions:
        raise ExportError(
            f"{path}'s output {name!r} is a decision or a table; scores are needed, one for each class"
        )
    del model.graph.output[:]
    model.graph.output.append(kept)
    drop_unused(model)
    _require_usual(path, model)
    return name


def _require_usual(path: Path, model: onnx.ModelProto) -> None:
    """Refuse networks that compute in ways of which no plain float graph can be made."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain not in STANDARD_DOMAINS:
            raise ExportError(
                f"{path}: {describe(node)} is an operator of {node.domain}, which only {_runtime(node)} has; "
                "export the network without it"
            )
        if node.op_type in _QUANTISED:
            raise ExportError(
                f"{path}: {describe(node)} quantises, and quantising is done here; give the network in floats"
            )
        if _is_training(node, constants):
            raise ExportError(
                f"{path}: {describe(node)} is still training; export the network after its eval()"
            )


def read_signature(
    path: Path, model: onnx.ModelProto, asked: tuple[int, int] | None, told: tuple[int, int] | None
) -> Signature:
    """What the network takes.

    Args:
        path: of the file, for messages.
        model: from `read_model`, with one output.
        asked: height and width that the user says.
        told: height and width that its preprocessing says; used where the model leaves them open.

    Raises:
        ExportError: no images; or sizes that are not known or not those asked for.
    """
    from onnx import TensorProto, helper

    inputs = list(model.graph.input)
    if len(inputs) != 1:
        names = ", ".join(f"{value.name} {_shape(value)}" for value in inputs)
        raise ExportError(f"{path} has {len(inputs)} inputs ({names}); a classifier of images has one")
    value = inputs[0]
    kind = value.type.tensor_type.elem_type
    dims = [max(dim.dim_value, 0) for dim in value.type.tensor_type.shape.dim]
    known = (TensorProto.UNDEFINED, TensorProto.STRING, TensorProto.BOOL)
    if kind in known or len(dims) not in _IMAGE_DIMENSIONS:
        raise ExportError(f"{path} takes {value.name} {_shape(value)}, no batch of images")
    layout: Layout = "NHW"
    channels = 1
    if len(dims) == max(_IMAGE_DIMENSIONS):
        layout = _layout(path, model, value, dims)
        channels = dims[1 if layout == "NCHW" else 3] or _channels_of_weights(model)
    place = 2 if layout == "NCHW" else 1
    fixed = dims[place : place + 2]
    size = asked or (told if 0 in fixed else None)
    if size is None and 0 in fixed:
        raise ExportError(
            f"{path} takes images of any size, {_shape(value)}; say which with --image-size, such as 224"
        )
    height, width = (own or open_ for own, open_ in zip(fixed, size or fixed, strict=True))
    if size is not None and (height, width) != size:
        raise ExportError(
            f"{path} takes images of {height}x{width}, not {size[0]}x{size[1]}; leave out --image-size"
        )
    try:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
    except (KeyError, ValueError) as error:
        raise ExportError(f"{path}'s images are of a type that NumPy does not have") from error
    output = model.graph.output[0].name
    return Signature(value.name, dtype, layout, dims[0] or None, channels, height, width, output)


def _layout(path: Path, model: onnx.ModelProto, value: onnx.ValueInfoProto, dims: list[int]) -> Layout:
    """By the place of one or three channels; where sizes are open, by the first convolution's."""
    _, second, _, last = dims
    if second in (1, 3):
        return "NCHW"
    if last in (1, 3):
        return "NHWC"
    if second or last:
        raise ExportError(
            f"{path} takes {value.name} {_shape(value)}; images have 1 or 3 channels, at place 2 or 4"
        )
    user = next((node for node in model.graph.node if value.name in node.input), None)
    return "NHWC" if user is not None and user.op_type == "Transpose" else "NCHW"


def _channels_of_weights(model: onnx.ModelProto) -> int:
    """How many channels the convolution takes that sees the images; three if there is none."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            channels = weights[node.input[1]].dims[1]
            return int(channels) if channels in (1, 3) else 3
    return 3


def _fill_sparse_weights(model: onnx.ModelProto) -> None:
    """Weights with all their zeros, where a file keeps only the others and their places."""
    from onnx import helper, numpy_helper

    graph = model.graph
    graph.initializer.extend(
        numpy_helper.from_array(_dense(sparse), sparse.values.name) for sparse in graph.sparse_initializer
    )
    del graph.sparse_initializer[:]
    for node in graph.node:
        (attribute, *_) = node.attribute or (None,)
        if node.op_type == "Constant" and attribute is not None and attribute.name == "sparse_value":
            value = numpy_helper.from_array(_dense(attribute.sparse_tensor))
            attribute.CopyFrom(helper.make_attribute("value", value))


def _dense(sparse: onnx.SparseTensorProto) -> NDArray[Any]:
    """A tensor whose values lie at flat places, or at one place along each axis."""
    from onnx import numpy_helper

    values, places = (numpy_helper.to_array(part) for part in (sparse.values, sparse.indices))
    shape = tuple(sparse.dims)
    if (size := math.prod(shape) * values.itemsize) > _LARGEST_WEIGHTS:
        raise ExportError(f"the weights {sparse.values.name} take {size:,} bytes with all their zeros")
    dense = np.zeros(shape, values.dtype)
    flat = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), shape)
    dense.ravel()[flat] = values
    return dense


def _weights_are_constants(model: onnx.ModelProto) -> None:
    """Weights neither among the inputs nor in nodes, as some exporters write them."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    nodes = []
    for node in graph.node:
        tensor = _constant_of(node) if node.op_type == "Constant" else None
        if tensor is None:
            nodes.append(node)
        else:
            graph.initializer.append(numpy_helper.from_array(tensor, node.output[0]))
    del graph.input[:], graph.node[:]
    graph.input.extend(inputs)
    graph.node.extend(nodes)
    model.ir_version = _IR_VERSION  # before 4 weights had to be inputs


def _constant_of(node: onnx.NodeProto) -> NDArray[Any] | None:
    from onnx import numpy_helper

    (attribute,) = node.attribute
    if attribute.name == "value":
        return numpy_helper.to_array(attribute.t)
    numbers = {
        "value_float": (attribute.f, np.float32),
        "value_floats": (list(attribute.floats), np.float32),
        "value_int": (attribute.i, np.int64),
        "value_ints": (list(attribute.ints), np.int64),
    }
    return np.array(*numbers[attribute.name]) if attribute.name in numbers else None


def _dequantise_weights(model: onnx.ModelProto) -> None:
    """Floats for weights in few bits that the network unpacks as it starts, as TFLite keeps them."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        of_weights = all(name in weights or not name for name in node.input)
        if node.op_type == "DequantizeLinear" and of_weights and len(weights[node.input[1]].dims) <= 1:
            arrays = [numpy_helper.to_array(weights[name]) for name in node.input if name]
            values = _dequantised(
                *arrays, axis=next((each.i for each in node.attribute if each.name == "axis"), 1)
            )
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _dequantised(
    values: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any] | None = None, *, axis: int
) -> NDArray[np.float32]:
    """As DequantizeLinear computes it, for one scale or one for each place along `axis`."""
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    shifted = values.astype(np.float32)
    if zero is not None:
        shifted -= zero.astype(np.float32).reshape(shape)
    return np.asarray(shifted * scale.astype(np.float32).reshape(shape), np.float32)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and weights that no output needs."""
    graph = model.graph
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
            wanted.update(_outer_names(node))
    tensors = [tensor for tensor in graph.initializer if tensor.name in wanted]
    inputs = [value for value in graph.input if value.name in wanted]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensors)
    graph.input.extend(inputs)


def _outer_names(node: onnx.NodeProto) -> Iterator[str]:
    """What the graphs inside a node, such as an If's, use from outside."""
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for each in inner.node:
                yield from each.input
                yield from _outer_names(each)


def _shape(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return "(no tensor)"
    dims = value.type.tensor_type.shape.dim
    sizes = [
        str(dim.dim_value) if dim.dim_value > 0 else dim.dim_param or ("N" if place == 0 else "?")
        for place, dim in enumerate(dims)
    ]
    return f"({', '.join(sizes)})"


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
