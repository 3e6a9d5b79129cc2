"""Where an OpenVINO engine spends its time, layer by layer."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import openvino

from runtime.manifest import EngineError, Manifest, read_artefact
from runtime.openvino import CONFIGURATION
from runtime.profiling import Layer

_WARM_UP_RUNS = 5


def profile(folder: Path, manifest: Manifest, batch: int, runs: int) -> list[Layer]:
    """The layers that run, in their order, with their mean time over `runs` batches.

    Raises:
        EngineError: the package is damaged or does not load.
    """
    blob = read_artefact(folder, manifest)
    try:
        model = openvino.Core().import_model(io.BytesIO(blob), "CPU", CONFIGURATION | {"PERF_COUNT": True})
        request = model.create_infer_request()
        pixels = np.random.default_rng(0).integers(0, 256, (batch, *manifest.input.shape[1:]), dtype=np.uint8)
        totals: dict[tuple[str, str, str], float] = {}
        for run in range(_WARM_UP_RUNS + runs):
            request.infer([pixels])
            if run < _WARM_UP_RUNS:
                continue
            for node in request.profiling_info:
                if node.status == openvino.ProfilingInfo.Status.EXECUTED:
                    layer = (node.node_name, node.node_type, node.exec_type)
                    totals[layer] = totals.get(layer, 0.0) + node.real_time.total_seconds()
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot profile {folder}: {error}") from error
    return [
        Layer(name=name, kind=kind, kernel=kernel, mean_ms=1000 * seconds / runs)
        for (name, kind, kernel), seconds in totals.items()
    ]
