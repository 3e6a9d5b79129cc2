"""Compile graphs for OpenVINO and run them, in a process whose instruction set is restricted.

`python engine_at_level.py FOLDER PIXELS.npy OUTPUT` writes, of every `*.onnx` in FOLDER, the logits of all
pixels in batches of several sizes, and what the package says of itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from builder.compile.targets.openvino.target import OpenVINOTarget
from runtime.manifest import BatchSizes
from runtime.openvino import CONFIGURATION

SIZES = (1, 3, 32)


def logits(model: openvino.CompiledModel, pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    parts = [model(pixels[start : start + size])[0].copy() for start in range(0, len(pixels), size)]
    return np.concatenate(parts)


def integer_layers(model: openvino.CompiledModel) -> int:
    kernels = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    layers = [
        str(kernel["runtimePrecision"].astype(str))
        for kernel in kernels
        if kernel["layerType"].astype(str) in ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
    ]
    return sum(precision in ("i8", "u8") for precision in layers)


def main(graphs: Path, pixels: NDArray[np.uint8], output: Path) -> None:
    said: dict[str, Any] = {}
    for graph in sorted(graphs.glob("*.onnx")):
        with tempfile.TemporaryDirectory() as folder:
            batch = BatchSizes(min=1, opt=8, max=32)
            artefact = OpenVINOTarget().compile(graph, Path(folder), batch, lambda _step: None)
            blob = openvino.Tensor(np.fromfile(Path(folder) / artefact.file, np.uint8))
            model = openvino.Core().import_model(blob, "CPU", CONFIGURATION)
        results = {f"batches of {size}": logits(model, pixels, size) for size in SIZES}
        np.savez(output / f"{graph.stem}.npz", **results)  # type: ignore[arg-type]
        said[graph.stem] = {
            "weight_bits": artefact.weight_bits,
            "features": artefact.compatibility.cpu_features,
            "integer_layers": integer_layers(model),
        }
    (output / "said.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), np.load(sys.argv[2]), Path(sys.argv[3]))
