"""The normal form of an ONNX classifier: float32 NCHW images of three channels and any batch size in, one
tensor of scores out, in standard operators of one opset, its weights constants of FP32.

Exporters differ in all of that. Here each difference is taken away by a small node beside the network, or by
none: what is done is checked afterwards against the file as it is (`builder.prepare.import_onnx`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import OPSET, ExportError, open_session, quiet
from builder.prepare.folding import fold_arithmetic
from builder.prepare.onnx_file import Signature, describe, drop_unused, first_line, opset_of

if TYPE_CHECKING:
    import onnx

NETWORK_INPUT: Final = "normal/images"  # of the normal form
LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts to grey
_CONTROL_FLOW: Final = ("If", "Loop", "Scan", "SequenceMap")


def normalise(
    path: Path, model: onnx.ModelProto, signature: Signature, *, fold_first: bool = False
) -> onnx.ModelProto:
    """The network in normal form, but for what its scores mean (`builder.prepare.heads`).

    Args:
        path: of the file, for messages.
        model: from `read_model`, with one output; it is not changed.
        signature: of `model`.
        fold_first: compute shapes with the batch size of the export before that is made free. A graph may
            need that which asks for its batch size in a way that cannot be followed.

    Raises:
        ExportError: an operator that cannot be converted or computed.
    """
    model = copy.deepcopy(model)
    _to_float32(model)
    model = _with_opset(path, model)
    _fix_paddings(model, signature)
    if fold_first:
        model = slim(_with_sizes(model, signature, signature.batch or 1))
    if signature.batch is not None:
        _free_strides(model, signature.batch)
        _free_reshapes(model, _sizes_of_reshapes(model, signature))
        _free_tokens(model)
    model = slim(_with_sizes(model, signature, "batch"))
    _prepend_layout(model, signature)
    fold_arithmetic(model)
    model = slim(model)
    for node in model.graph.node:
        if node.op_type in _CONTROL_FLOW:
            raise ExportError(f"{path}: {describe(node)} decides as it runs; export the network without it")
    return model


def mix_channels(model: onnx.ModelProto, matrix: NDArray[np.float32]) -> None:
    """Let a network in normal form take other channels, of which its own are `matrix` times those.

    The matrix becomes part of the first convolution, or a convolution before it.

    Args:
        model: its input has as many channels as `matrix` has rows.
        matrix: shape (channels of the network, 3).
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    users, place = [node for node in graph.node if NETWORK_INPUT in node.input], 0
    weights = {tensor.name: tensor for tensor in graph.initializer}
    if len(users) == 1 and users[0].op_type == "Pad" and len(users[0].input) <= 2:  # with zeros
        users = [node for node in graph.node if users[0].output[0] in node.input]
    layer = users[0]
    fits = layer.op_type == "Conv" and layer.input[1] in weights
    if len(users) == 1 and fits and _attribute(layer, "group", 1) == 1:
        mixed = np.einsum("oc...,cr->or...", numpy_helper.to_array(weights[layer.input[1]]), matrix)
        name = "normal/first_weights"
        graph.initializer.append(numpy_helper.from_array(mixed.astype(np.float32), name))
        layer.input[1] = name
        drop_unused(model)
    else:
        graph.initializer.append(
            numpy_helper.from_array(matrix.astype(np.float32)[:, :, None, None], "normal/channel_weights")
        )
        for node in graph.node:
            node.input[:] = ["normal/mixed" if name == NETWORK_INPUT else name for name in node.input]
        inputs = [NETWORK_INPUT, "normal/channel_weights"]
        graph.node.insert(place, helper.make_node("Conv", inputs, ["normal/mixed"], "normal/channels"))
    graph.input[0].type.tensor_type.shape.dim[1].dim_value = matrix.shape[1]
    del graph.value_info[:]


def _to_float32(model: onnx.ModelProto) -> None:
    """FP32 for every other floating type, in weights, attributes and casts."""
    from onnx import AttributeProto, TensorProto, numpy_helper

    others = {TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}

    def converted(tensor: onnx.TensorProto) -> onnx.TensorProto:
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

    for tensor in model.graph.initializer:
        if tensor.data_type in others:
            tensor.CopyFrom(converted(tensor))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in others:
                attribute.t.CopyFrom(converted(attribute.t))
            if attribute.name in ("to", "dtype") and attribute.i in others:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]


def _with_opset(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the opset of all graphs here."""
    import onnx
    from onnx import version_converter

    version = opset_of(model)
    if version == OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises bare RuntimeErrors and others
        # It knows few ways back from newer opsets. Most operators have not changed, which the checker and
        # the comparison with the original find out.
        renumbered = copy.deepcopy(model)
        del renumbered.opset_import[:]
        renumbered.opset_import.append(onnx.helper.make_opsetid("", OPSET))
        try:
            onnx.checker.check_model(renumbered, full_check=True)
        except Exception:  # several types
            raise ExportError(
                f"{path} is of opset {version} and cannot be converted to {OPSET} "
                f"({first_line(error)}); export it with opset {OPSET}"
            ) from error
        return renumbered


def _with_sizes(model: onnx.ModelProto, signature: Signature, batch: int | str) -> onnx.ModelProto:
    """The model with the sizes of its input filled in, and that batch size."""
    height, width, channels = signature.height, signature.width, signature.channels
    sizes: list[int | str] = {
        "NCHW": [batch, channels, height, width],
        "NHWC": [batch, height, width, channels],
        "NHW": [batch, height, width],
    }[signature.layout]
    shape = model.graph.input[0].type.tensor_type.shape
    for dim, size in zip(shape.dim, sizes, strict=True):
        dim.Clear()
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size
    model.graph.output[0].type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return model


def _prepend_layout(model: onnx.ModelProto, signature: Signature) -> None:
    """Take NCHW images, whatever the network itself takes."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    sizes: list[str | int | None] = ["batch", signature.channels, signature.height, signature.width]
    old = graph.input[0].name
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(NETWORK_INPUT, TensorProto.FLOAT, sizes))
    if signature.layout == "NCHW":
        for node in graph.node:
            node.input[:] = [NETWORK_INPUT if name == old else name for name in node.input]
        return
    if signature.layout == "NHWC":
        node = helper.make_node("Transpose", [NETWORK_INPUT], [old], "normal/layout", perm=[0, 2, 3, 1])
    else:
        graph.initializer.append(numpy_helper.from_array(np.array([1]), "normal/channel_axis"))
        node = helper.make_node("Squeeze", [NETWORK_INPUT, "normal/channel_axis"], [old], "normal/layout")
    graph.node.insert(0, node)


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with constants and normalisations folded, and without nodes that do nothing."""
    import onnxslim

    try:
        with quiet():
            slimmed: onnx.ModelProto = onnxslim.slim(copy.deepcopy(model))
            return slimmed
    except Exception:  # a graph that it does not understand is taken as it is
        return model


def _free_strides(model: onnx.ModelProto, batch: int) -> None:
    """Reshape where PyTorch's exporter flattens a whole batch and gathers its elements in their own order."""
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        flat = producers.get(node.input[0]) if node.op_type == "Gather" else None
        if flat is None or flat.op_type != "Reshape" or node.input[1] not in weights:
            continue
        order = numpy_helper.to_array(weights[node.input[1]])
        target = weights.get(flat.input[1])
        is_flat = target is not None and numpy_helper.to_array(target).tolist() == [-1]
        if is_flat and order.shape[:1] == (batch,) and (order.ravel() == np.arange(order.size)).all():
            name = f"normal/shape_{node.output[0]}"
            shape = np.array([-1, *order.shape[1:]], np.int64)
            graph.initializer.append(numpy_helper.from_array(shape, name))
            node.CopyFrom(helper.make_node("Reshape", [flat.input[0], name], list(node.output), node.name))


def _sizes_of_reshapes(model: onnx.ModelProto, signature: Signature) -> dict[str, tuple[int, ...]]:
    """The shapes that Reshape nodes give for the batch size of the export, by the names of their outputs."""
    names = [node.output[0] for node in model.graph.node if node.op_type == "Reshape"]
    return {name: array.shape for name, array in _values(model, signature, names).items()}


def _fix_paddings(model: onnx.ModelProto, signature: Signature) -> None:
    """Constants for paddings that a graph computes from the size of its images, which is fixed here.

    onnxslim's shape inference turns them round where they differ from side to side, as TensorFlow's `same`
    has them.
    """
    from onnx import numpy_helper

    constant = _constants(model)
    pads = [node for node in model.graph.node if node.op_type == "Pad" and node.input[1] not in constant]
    found = _values(model, signature, [node.input[1] for node in pads])
    for node in pads:
        name = f"normal/padding_{node.output[0]}"
        model.graph.initializer.append(numpy_helper.from_array(found[node.input[1]], name))
        node.input[1] = name


def _values(model: onnx.ModelProto, signature: Signature, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """What tensors within a graph are for black images, as many as the export had."""
    from onnx import ModelProto, ValueInfoProto

    if not names:
        return {}
    watched = ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in watched.graph.output}
    names = list(dict.fromkeys(names))
    watched.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in known)
    sizes = signature.batch or 1, signature.channels, signature.height, signature.width
    images = signature.arrange(np.zeros(sizes, np.float32)).astype(np.float32)
    found = open_session(watched.SerializeToString()).run(names, {signature.input: images})
    return dict(zip(names, found, strict=True))


def _free_reshapes(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> None:
    """Let reshapes that name the batch size of the export, or a multiple, keep whatever they get.

    The batch is what the first dimension is made of: alone, or with windows or heads of each image.
    """
    from onnx import helper, numpy_helper

    weights = {tensor.name for tensor in model.graph.initializer}
    constant = _constants(model)
    for node in model.graph.node:
        size = sizes.get(node.output[0], ())
        if node.op_type != "Reshape" or node.input[0] in constant or node.input[1] not in weights or not size:
            continue
        name = f"normal/shape_{node.output[0]}"
        shape = np.array([-1, *size[1:]], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(shape, name))
        node.CopyFrom(helper.make_node("Reshape", [node.input[0], name], list(node.output), node.name))


def _free_tokens(model: onnx.ModelProto) -> None:
    """Repeat constants that are joined to every image's own values, such as a class token."""
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Concat" and _attribute(node, "axis", 0) != 0:
            other = next((name for name in node.input if name not in weights), None)
            for place, name in enumerate(node.input):
                if other is None or name not in weights or len(weights[name].dims) < 2:
                    continue
                values = numpy_helper.to_array(weights[name])[:1]
                base = f"normal/{node.output[0]}_{place}"
                graph.initializer.append(numpy_helper.from_array(values, f"{base}_value"))
                rest = np.array(values.shape[1:], np.int64)
                graph.initializer.append(numpy_helper.from_array(rest, f"{base}_rest"))
                nodes += [
                    helper.make_node("Shape", [other], [f"{base}_batch"], f"{base}_batch", start=0, end=1),
                    helper.make_node(
                        "Concat",
                        [f"{base}_batch", f"{base}_rest"],
                        [f"{base}_shape"],
                        f"{base}_sizes",
                        axis=0,
                    ),
                    helper.make_node(
                        "Expand", [f"{base}_value", f"{base}_shape"], [f"{base}_each"], f"{base}_each"
                    ),
                ]
                node.input[place] = f"{base}_each"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _constants(model: onnx.ModelProto) -> set[str]:
    """Tensors that do not depend on the images."""
    found = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in found or not name for name in node.input):
            found.update(node.output)
    return found


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
