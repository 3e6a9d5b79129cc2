"""Compile for CPUs with OpenVINO: `engine.blob`, with the graph it was made from beside it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import openvino
from openvino import opset13

from builder.compile.targets.base import Artefact, CompileError
from builder.compile.targets.openvino.channel_padding import pad_channels
from builder.compile.targets.openvino.folding import fold_normalisation
from builder.compile.targets.openvino.saturation import make_safe, sums_saturate
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
            limited = _is_quantised(model) and sums_saturate()
            fold_normalisation(core, model, framed=amx)
            if limited:
                make_safe(core, model)
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
        return Artefact(
            BLOB_NAME,
            openvino.get_version(),
            machine,
            batch,
            arithmetic="fp32",
            saturation_safe=limited,
        )

    def missing_device(self) -> str | None:
        """None: every machine that OpenVINO installs on has its CPU plugin."""
        return None


def _is_quantised(model: openvino.Model) -> bool:
    return any(op.get_type_name() == "FakeQuantize" for op in model.get_ordered_ops())


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
