"""What an INT8 package's graph tells: the ranges of its layers, and what quantising each one costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from builder.compile.targets.openvino.target import GRAPH_NAME
from builder.prepare.sensitivity import layer_scales, rank_layers
from builder.weights import LEVELS
from models.datasets import DataSplit
from runtime.manifest import sha256_of
from trimrt.report.discovery import EnginePackage, ReportError
from trimrt.report.results import LayerError, LayerRange

if TYPE_CHECKING:
    import onnx

SENSITIVITY_IMAGES: Final = 128  # as many as `trimrt build --sensitivity` looks at


def read_graph(package: EnginePackage) -> onnx.ModelProto:
    """The graph that the package was compiled from, which OpenVINO packages carry.

    Raises:
        ReportError: it is not there or was changed.
    """
    path = package.folder / GRAPH_NAME
    if not path.is_file():
        raise ReportError(
            f"the package has no {GRAPH_NAME}; {package.manifest.backend} packages carry no graph"
        )
    if sha256_of(path) != package.manifest.provenance.onnx_sha256:
        raise ReportError(f"{path.name} was changed since the build; rebuild the package")
    try:
        import onnx
    except ImportError as error:
        raise ReportError(f"reading {path.name} needs `pip install 'trimrt[compress]'` ({error})") from error
    return onnx.load(str(path))


def layer_titles(model: onnx.ModelProto) -> dict[str, str]:
    """The network's own names of its layers, such as `layer1.0.conv2`, by nodes and their outputs."""
    producers = {name: node for node in model.graph.node for name in node.output}
    titles = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        weights = node.input[1]
        if weights in producers and producers[weights].op_type == "DequantizeLinear":
            weights = producers[weights].input[0]
        title = weights.removeprefix("network/").removesuffix("/int8").removesuffix(".weight")
        for name in (node.name, *node.output):
            titles[name] = title
    return titles


def layer_ranges(model: onnx.ModelProto) -> list[LayerRange]:
    """The ranges of each quantised layer of a static INT8 graph, in the graph's order."""
    titles = layer_titles(model)
    ranges = []
    for name, scales in layer_scales(model).items():
        weights = LEVELS * np.atleast_1d(scales.weights).astype(np.float64)
        ranges.append(
            LayerRange(
                layer=titles[name],
                activation=LEVELS * scales.activation,
                weights_low=float(weights.min()),
                weights_median=float(np.median(weights)),
                weights_high=float(weights.max()),
            )
        )
    return ranges


def layer_errors(
    package: EnginePackage,
    checkpoint: Path,
    siblings: Sequence[EnginePackage],
    data: DataSplit,
    report: Callable[[str], None],
) -> list[LayerError]:
    """What quantising each layer alone costs, the costliest first, on training images.

    Args:
        package: static INT8.
        checkpoint: folder that it was built from.
        siblings: other packages; the FP32 one of the same checkpoint spares the export.
        data: the checkpoint's.
        report: takes lines of progress.

    Raises:
        ReportError: a graph is missing or does not fit the other.
        CheckpointError, ExportError: there is no FP32 package, and the checkpoint cannot be exported.
        DatasetError: an image cannot be read.
    """
    calibration = package.manifest.provenance.calibration
    if calibration is not None and "equalised" in calibration.changes:
        raise ReportError("its weights were equalised, so its layers do not fit the checkpoint's graph")
    quantised = read_graph(package)
    images = data.train.spread(SENSITIVITY_IMAGES, "sensitivity")
    pixels = images.load_pixels(package.manifest.preprocessing)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as folder:
        path = _master(package, checkpoint, siblings, Path(folder), report)
        import onnx

        master = onnx.load(str(path), load_external_data=False)
        if strangers := set(layer_scales(quantised)) - {node.name for node in master.graph.node}:
            raise ReportError(
                f"its graph has other layers ({min(strangers)}) than the checkpoint exports today; rebuild it"
            )
        costs = rank_layers(master, quantised, pixels, report)
    titles = layer_titles(quantised)
    return [LayerError(layer=titles[cost.layer], error=cost.error) for cost in costs]


def _master(
    package: EnginePackage,
    checkpoint: Path,
    siblings: Sequence[EnginePackage],
    workspace: Path,
    report: Callable[[str], None],
) -> Path:
    """The FP32 graph: of the FP32 package built from the same weights, or exported from them."""
    for sibling in siblings:
        manifest = sibling.manifest
        same = manifest.provenance.checkpoint_sha256 == package.manifest.provenance.checkpoint_sha256
        if same and manifest.precision == "fp32" and manifest.backend == "openvino":
            try:
                read_graph(sibling)
            except ReportError:
                continue
            return sibling.folder / GRAPH_NAME
    from builder.prepare.export import export_onnx
    from models.checkpoint import load_checkpoint

    report("exporting to ONNX")
    network, card = load_checkpoint(checkpoint)
    path = workspace / "fp32.onnx"
    export_onnx(network, card.preprocessing, path)
    return path
