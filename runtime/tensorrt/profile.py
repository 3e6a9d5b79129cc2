"""Where a plan spends its time, layer by layer, as TensorRT's own profiler tells."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from runtime.engine import Options
from runtime.manifest import EngineError, Manifest
from runtime.profiling import Layer
from runtime.tensorrt.engine import load
from runtime.tensorrt.layers import PlanLayer, read_layers

_WARM_UP_RUNS: Final = 5


def profile(folder: Path, manifest: Manifest, batch: int, runs: int) -> list[Layer]:
    """The layers that run, in their order, with their mean time over `runs` batches.

    They run one after the other, without CUDA graphs, so together they take longer than a batch does.

    Raises:
        EngineError: the package does not load here, or does not run.
    """
    with closing(load(folder, manifest, Options(slots=1, cuda_graphs=False))) as engine:
        slot = engine.open_slot()
        with closing(slot):
            slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, dtype=np.uint8)
            for _ in range(_WARM_UP_RUNS):
                slot.infer(batch)
            totals: dict[str, float] = {}
            slot.report_layers(batch, _profiler(engine.trt, totals))
            for _ in range(runs):
                slot.infer(batch)
    listed: dict[str, PlanLayer] = {}
    with suppress(EngineError):  # a package without a list
        listed = {layer.name: layer for layer in read_layers(folder)}
    return [_layer(name, listed.get(name), total / runs) for name, total in totals.items()]


def _layer(name: str, listed: PlanLayer | None, mean_ms: float) -> Layer:
    kind, kernel = ("", "") if listed is None else (listed.kind, listed.kernel)
    return Layer(name=name, kind=kind, kernel=kernel, mean_ms=mean_ms)


def _profiler(trt: Any, totals: dict[str, float]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the base class is known only now
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            totals[layer_name] = totals.get(layer_name, 0.0) + ms

    return Profiler()
