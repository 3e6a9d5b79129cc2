"""PyTorch network to the *master graph*: FP32 ONNX that takes pixels.

Every other graph is derived from it. Its input is what `models.preprocessing.load_pixels` returns,
so nobody can normalise wrongly, and a quarter of the bytes move to the device:

    images uint8 (N, H, W, 3) -> pre/cast -> pre/centre -> pre/scale -> pre/layout -> network
    -> logits -> post/softmax (or post/sigmoid) -> probabilities

The cast comes first because TensorRT lets a UINT8 tensor feed nothing else. The nodes `pre/*` and
`post/*` are what the precision conversions leave in FP32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.kit import INPUT, LOGITS, PROBABILITIES
from builder.prepare.quiet_import import import_onnxruntime
from models.errors import TrimRTError
from models.preprocessing import Pixels, Preprocessing
from runtime.manifest import Activation

if TYPE_CHECKING:
    import onnx
    import onnxruntime
    import torch

OPSET: Final = 20  # the newest that TensorRT 10.3 (JetPack 6) knows; FP16 quantisation scales need 19
TOLERANCE: Final = 1e-4  # of the largest logit: FP32 rounding through a hundred layers stays below it

_BATCH: Final = 32


class ExportError(TrimRTError):
    """A network that cannot be exported, or whose graph's output differs from PyTorch's."""


@contextlib.contextmanager
def importing(what: str, instead: str) -> Iterator[None]:
    """Import what prepares networks; ONNX Runtime first, for ModelOpt would let it print its warnings.

    Args:
        what: needs it.
        instead: what can be done here with a kit that was prepared elsewhere.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import_onnxruntime()
        yield
    except ImportError as error:
        raise ExportError(
            f"{what} needs what `pip install 'trimrt[compress]'` brings ({error}). Or run `trimrt prepare` "
            f"where that is installed, and {instead} here"
        ) from error


# Nodes that no conversion changes; names as `add_pixels_input` gives them.
KEPT_IN_FP32: Final = ("pre/.*", "post/.*", "network/normal/head.*")


def export_onnx(
    network: torch.nn.Module, preprocessing: Preprocessing, path: Path, activation: Activation = "softmax"
) -> None:
    """Write the master graph of `network`; `require_same` compares them.

    Args:
        network: takes normalised float32 NCHW images, gives logits of shape `(N, classes)`.
        preprocessing: input size and normalisation, which become part of the graph.
        path: the `.onnx` file to write.
        activation: makes its probabilities.

    Raises:
        ExportError: it has several outputs.
    """
    import onnx

    onnx.save(trace_onnx(network.eval(), preprocessing, activation), str(path))


def require_same(path: Path, pixels: Pixels, expected: NDArray[np.float32]) -> float:
    """The largest absolute difference between a graph's logits of uint8 NHWC `pixels` and those expected.

    Raises:
        ExportError: that difference is more than rounding.
    """
    difference = float(np.abs(run_onnx(path, pixels) - expected).max())
    bound = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= bound:  # not `>`, so that NaN fails too
        raise ExportError(
            f"the exported graph's logits differ from the network's by {difference:.2g}, more than rounding "
            f"explains ({bound:.2g}): the network does something that the export does not carry over"
        )
    return difference


def random_pixels(spec: Preprocessing, count: int) -> Pixels:
    """Images of noise as a network with that preprocessing gets them, uint8 NHWC; always the same."""
    return np.random.default_rng(0).integers(0, 256, (count, spec.height, spec.width, 3), dtype=np.uint8)


def trace_onnx(
    network: torch.nn.Module, preprocessing: Preprocessing, activation: Activation = "softmax"
) -> onnx.ModelProto:
    """The graph of `network`, in evaluation mode, with pixels as input, not yet compared with it."""
    import onnx
    import torch

    example = torch.zeros(2, 3, preprocessing.height, preprocessing.width)
    with quiet():
        program = torch.onnx.export(
            network.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None  # None is what the exporter before dynamo returned
    model = add_pixels_input(program.model_proto, preprocessing, activation)
    onnx.checker.check_model(model, full_check=True)
    return model


def add_pixels_input(
    model: onnx.ModelProto, preprocessing: Preprocessing, activation: Activation = "softmax"
) -> onnx.ModelProto:
    """A network's graph with pixels as input, and probabilities as second output.

    Args:
        model: one input, normalised float32 NCHW images of red, green and blue; one output, logits.
        preprocessing: input size and normalisation.
        activation: makes the probabilities.

    Raises:
        ExportError: the model has not exactly one input and one output.
    """
    from onnx import TensorProto, compose, helper, numpy_helper

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    outputs = [value.name for value in model.graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(f"the network needs one input and one output; it has {inputs} and {outputs}")

    # The prefix keeps the network's own names clear of ours, whatever they are.
    model = compose.add_prefix(model, "network/")
    graph = model.graph
    for node in graph.node:
        node.output[:] = [LOGITS if name == f"network/{outputs[0]}" else name for name in node.output]
        node.input[:] = [LOGITS if name == f"network/{outputs[0]}" else name for name in node.input]
        node.ClearField("metadata_props")  # the exporter's stack traces: paths of the machine it ran on
        node.ClearField("doc_string")

    mean, std = (255 * values for values in rgb_normalisation(preprocessing))
    scale = 1 / std
    pre = [
        helper.make_node("Cast", [INPUT], ["pre/float"], "pre/cast", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pre/float", "pre/mean"], ["pre/centred"], "pre/centre"),
        helper.make_node("Mul", ["pre/centred", "pre/inverse_std"], ["pre/scaled"], "pre/scale"),
        helper.make_node(
            "Transpose", ["pre/scaled"], [f"network/{inputs[0]}"], "pre/layout", perm=[0, 3, 1, 2]
        ),
    ]
    post = (
        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], "post/softmax", axis=1)
        if activation == "softmax"
        else helper.make_node("Sigmoid", [LOGITS], [PROBABILITIES], "post/sigmoid")
    )
    nodes = [*pre, *graph.node, post]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        [
            numpy_helper.from_array(mean.astype(np.float32), "pre/mean"),
            numpy_helper.from_array(scale.astype(np.float32), "pre/inverse_std"),
        ]
    )

    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    kept = [value for value in graph.input if value.name != f"network/{inputs[0]}"]
    del graph.input[:], graph.output[:], graph.value_info[:]
    shape: list[str | int | None] = ["batch", preprocessing.height, preprocessing.width, 3]
    graph.input.extend([helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape), *kept])
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
        for name in (LOGITS, PROBABILITIES)
    )
    return model


def rgb_normalisation(preprocessing: Preprocessing) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation in the order of pixels, for networks of any order of channels."""
    order = -1 if preprocessing.channels == "BGR" else 1
    mean, std = (
        np.asarray(values, np.float64)[::order] for values in (preprocessing.mean, preprocessing.std)
    )
    return mean, std


def open_session(
    model: str | bytes, *, exact: bool = False, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """A graph, or a file's path, ready to run on the CPU.

    Args:
        model: the graph, serialised, or its file's path.
        exact: compute Q/DQ as it is written: in floating point, rounded where it says so. Integer kernels,
            into which ONNX Runtime would fuse it, add an error of their own.
        threads: that compute; None: one for each core.
    """
    onnxruntime = import_onnxruntime()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well
    options.intra_op_num_threads = threads or 0
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(model: Path | onnx.ModelProto, images: NDArray[Any]) -> NDArray[np.float32]:
    """The first output of a graph with one input, computed by ONNX Runtime on the CPU, 32 images at a time.

    Args:
        model: the graph, or its file.
        images: uint8 NHWC pixels, or what else it takes; the first axis is the batch.
    """
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = open_session(source)
    given, wanted = session.get_inputs()[0].name, session.get_outputs()[0].name
    parts = np.array_split(images, -(-len(images) // _BATCH))
    return np.concatenate([session.run([wanted], {given: part})[0] for part in parts])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter and the converters: nothing that they print is for the user."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
