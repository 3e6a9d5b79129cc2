"""Compile for CPUs with OpenVINO: `engine.blob`, with the graph it was made from beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13

from builder.compile.targets.base import Artefact, CompileError
from builder.compile.targets.channel_padding import pad_channels
from builder.kit import Report
from runtime.manifest import Backend, BatchSizes
from runtime.openvino import CONFIGURATION, this_machine

BLOB_NAME: Final = "engine.blob"
GRAPH_NAME: Final = "model.onnx"


class OpenVINOTarget:
    """OpenVINO's CPU plugin."""

    backend: Backend = "openvino"

    def compile(self, graph: Path, folder: Path, batch: BatchSizes, report: Report) -> Artefact:
        """Write `engine.blob` and `model.onnx` to `folder`."""
        core = openvino.Core()
        report("reading the graph")
        try:
            model = _keep_fp16_weights(core, core.read_model(graph))
            machine = this_machine()
            amx = "amx_int8" in machine.cpu_features
            if amx:
                model = pad_channels(model)
            fold_normalisation(core, model, framed=amx)
            pixels = model.input(0)
            shape = pixels.partial_shape
            shape[0] = openvino.Dimension(batch.min, batch.max)
            model.reshape({pixels: shape})
            report("compiling")
            blob = core.compile_model(model, "CPU", CONFIGURATION).export_model()
        except RuntimeError as error:
            raise CompileError(f"OpenVINO cannot compile {graph.name}: {error}") from error
        (folder / BLOB_NAME).write_bytes(blob.getbuffer())
        shutil.copyfile(graph, folder / GRAPH_NAME)
        return Artefact(BLOB_NAME, openvino.get_version(), machine, batch, arithmetic="fp32")

    def missing_device(self) -> str | None:
        """None: every machine that OpenVINO installs on has its CPU plugin."""
        return None


def fold_normalisation(core: openvino.Core, model: openvino.Model, *, framed: bool = False) -> None:
    """Let a quantised first convolution read the pixels themselves; any other graph stays as it is.

    `(pixels - mean) / std`, rounded to INT8, is a pass over the image of its own, and loses some of it.
    But pixels are 8-bit integers already: the mean, rounded, is their zero point, and what was rounded
    off goes into a bias; the standard deviation goes into the weights.

    Args:
        core: runs what is constant.
        model: changed in place.
        framed: whether the zero point is the same for all channels, as kernels for AMX require. What pads the
            image must be the mean still, so a frame of it is put around the pixels.
    """
    nodes = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
    layout = nodes.get("pre/layout")
    convolution = layout and _only_user(layout)
    if convolution is None or convolution.get_type_name() != "FakeQuantize":
        return
    while convolution is not None and convolution.get_type_name() != "Convolution":
        convolution = _only_user(convolution)
    if convolution is None:
        return

    mean = _constant(core, nodes["pre/centre"].input_value(1)).reshape(1, -1, 1, 1)
    inverse_std = _constant(core, nodes["pre/scale"].input_value(1)).reshape(1, -1, 1, 1)
    weights = _constant(core, convolution.input_value(1)) * inverse_std
    scale = np.maximum(np.abs(weights).max(axis=(1, 2, 3), keepdims=True) / 127, np.finfo(np.float32).tiny)
    quantised = np.round(weights / scale).astype(np.int8)
    padding = np.round(mean).astype(np.uint8)
    zero_point = np.full((1, 1, 1, 1), np.round(mean.mean()), np.uint8) if framed else padding
    rest = (scale * quantised * (zero_point - mean)).sum(axis=(1, 2, 3)).reshape(1, -1, 1, 1)

    attributes = convolution.get_attributes()
    images, before, after = model.input(0), attributes["pads_begin"], attributes["pads_end"]
    if framed:
        images = _frame(images, padding.ravel(), before, after)
        before = after = [0, 0]
    pixels = opset13.convert(opset13.transpose(images, np.array([0, 3, 1, 2])), "f32")
    low, high = (np.full((1, 1, 1, 1), value, np.float32) for value in (0, 255))
    pixels = opset13.fake_quantize(pixels, low, high, low, high, levels=256)  # as they are: tells the range
    pixels = opset13.subtract(pixels, opset13.convert(opset13.constant(zero_point), "f32"))
    # A power of two is exact, and one would be optimised away, and with it that this is a quantised input.
    pixels = opset13.multiply(pixels, np.full((1, 1, 1, 1), 2**-8, np.float32))
    folded = opset13.multiply(
        opset13.convert(opset13.constant(quantised), "f32"), (2**8 * scale).astype(np.float32)
    )
    users = convolution.output(0).get_target_inputs()
    strides, dilations = attributes["strides"], attributes["dilations"]
    convolved = opset13.convolution(pixels, folded, strides, before, after, dilations)
    convolved.set_friendly_name(convolution.get_friendly_name())  # reports speak of layers by their names
    biased = opset13.add(convolved, rest.astype(np.float32))
    for user in users:
        user.replace_source_output(biased.output(0))
    model.validate_nodes_and_infer_types()


def _frame(
    images: openvino.Output, colour: NDArray[np.uint8], before: Sequence[int], after: Sequence[int]
) -> openvino.Output:
    """Images with so many pixels of that colour above and left of them, and below and right."""
    count = opset13.gather(opset13.shape_of(images), np.array([0]), np.array(0))
    for axis in (2, 1):
        shape = [dimension.get_length() for dimension in list(images.partial_shape)[1:]]

        def strip(width: int, axis: int = axis, shape: list[int] = shape) -> list[openvino.Node]:
            sizes = np.array([*shape[: axis - 1], width, *shape[axis:]])
            return [opset13.broadcast(colour, opset13.concat([count, sizes], 0))] if width else []

        images = opset13.concat([*strip(before[axis - 1]), images, *strip(after[axis - 1])], axis).output(0)
    return images


def _only_user(op: openvino.Node) -> openvino.Node | None:
    users = op.output(0).get_target_inputs()
    return users.pop().get_node() if len(users) == 1 else None


def _constant(core: openvino.Core, output: openvino.Output) -> NDArray[np.float64]:
    """The value of a part of a graph that depends on no input."""
    value: NDArray[np.float32] = core.compile_model(openvino.Model([output], []), "CPU", CONFIGURATION)([])[0]
    return value.astype(np.float64)


def _keep_fp16_weights(core: openvino.Core, model: openvino.Model) -> openvino.Model:
    """An FP16 graph as FP32 arithmetic over weights that stay FP16 in the blob; any other as it is.

    The CPU plugin computes FP16 graphs in FP32 by itself, but then stores the weights as FP32 too.
    """
    half = openvino.Type.f16
    halved = [op for op in model.get_ordered_ops() if op.get_output_element_type(0) == half]
    if not halved:
        return model
    for op in halved:
        kind, users = op.get_type_name(), op.output(0).get_target_inputs()
        if kind == "Constant":
            source = opset13.constant(op.data.astype(np.float32)).output(0)
        elif kind == "Convert":
            source = op.input_value(0)
            if source.get_element_type() != openvino.Type.f32:  # pixels, in a graph without FP32
                source = opset13.convert(source, "f32").output(0)
        else:
            continue  # its type follows from its inputs
        for user in users:
            user.replace_source_output(source)
    model.validate_nodes_and_infer_types()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=True)
        # Unmapped, or the file would have to outlive this function.
        return core.read_model(path, config={"ENABLE_MMAP": False})
