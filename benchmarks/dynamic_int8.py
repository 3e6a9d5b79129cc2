"""Dynamic INT8 on OpenVINO, ours and ONNX Runtime's: `python -m benchmarks.dynamic_int8 KIT`.

All graphs are timed in turn, so that a busy machine slows all alike.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import click
import numpy as np
import openvino
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich.console import Console
from rich.table import Table

from builder.compile.measurement import time_in_turns
from builder.kit import KitError, open_kit
from builder.prepare.int8_dynamic import convert_to_dynamic_int8
from models.preprocessing import Pixels
from runtime.openvino import CONFIGURATION
from trimrt.options import HELP

BATCH = 8


def run(request: openvino.InferRequest, pixels: Pixels, batch: int) -> NDArray[np.float32]:
    """Logits of all `pixels`, `batch` at a time."""
    parts = [pixels[start : start + batch] for start in range(0, len(pixels), batch)]
    return np.concatenate([request.infer({0: part})[0].copy() for part in parts])


@click.command(context_settings=HELP)
@click.argument("kit", type=click.Path(path_type=Path))
@click.option("--rounds", default=200, help="Timings of each graph and batch size.")
def main(kit: Path, rounds: int) -> None:
    """Speed, accuracy and batch dependence of the FP32 graph in KIT (`trimrt prepare`), quantised."""
    try:
        opened = open_kit(kit)
        _, master = next(opened.graphs("fp32", "fp32"))
    except KitError as error:
        raise click.ClickException(str(error)) from error
    pixels, expected = opened.verification.pixels[:256], opened.verification.logits[:256]
    core = openvino.Core()
    table = Table("graph", "MB", "1 image, ms", f"{BATCH} images, ms", "logit error", "batch dependence")
    with tempfile.TemporaryDirectory() as folder:
        graphs = {"FP32": master, "TrimRT": Path(folder, "a.onnx"), "ONNX Runtime": Path(folder, "b.onnx")}
        convert_to_dynamic_int8(master, graphs["TrimRT"])
        quantize_dynamic(master, graphs["ONNX Runtime"], per_channel=True, weight_type=QuantType.QInt8)
        # A loaded model for each batch size, as the runtime has.
        requests = {
            (name, batch): core.compile_model(graph, "CPU", CONFIGURATION).create_infer_request()
            for name, graph in graphs.items()
            for batch in (1, BATCH)
        }
        runs = [partial(request.infer, {0: pixels[:batch]}) for (_, batch), request in requests.items()]
        times = dict(zip(requests, time_in_turns(runs, rounds=rounds), strict=True))
        for name, graph in graphs.items():
            alone, together = (run(requests[name, batch], pixels, batch) for batch in (1, BATCH))
            table.add_row(
                name,
                f"{graph.stat().st_size / 1e6:.2f}",
                *(f"{np.median(times[name, batch]):.2f}" for batch in (1, BATCH)),
                f"{np.abs(together - expected).max():.3f}",
                f"{np.abs(together - alone).max():.3f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
