"""Our own graphs, ResNet18-sized, in every precision; each is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import build_once

from builder.prepare.export import export_onnx
from builder.prepare.fp16 import convert_to_fp16
from builder.prepare.int8 import convert_to_int8
from builder.prepare.int8_dynamic import convert_to_dynamic_int8
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.pruning import Pruner
from models.recipe import make_recipe
from runtime.tensorrt.library import TensorRTLibrary, load_tensorrt

SPEC = Preprocessing(resize=32, height=32, width=32)
UNPRUNED = "unpruned"


@pytest.fixture(scope="session")
def rtx() -> TensorRTLibrary:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")
    return load_tensorrt("tensorrt-rtx")


@pytest.fixture(scope="session")
def graph(tmp_path_factory) -> Callable[..., Path]:
    """`graph(precision, preset=...)`: a ResNet18, pruned as a preset of `trimrt compress` does it."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)

    def make(precision: str, preset: str = UNPRUNED) -> Path:
        def build(folder: Path) -> None:
            write(folder / "graph.onnx", precision, preset)

        return build_once(tmp_path_factory, f"{preset}-{precision}", build) / "graph.onnx"

    def write(path: Path, precision: str, preset: str) -> None:
        if precision == "fp32":
            torch.manual_seed(0)
            network = build_network("resnet18", classes=10).eval()
            if preset != UNPRUNED:
                pruning = make_recipe(preset=preset).pruning
                Pruner(network, SPEC, pruning.model_copy(update={"steps": 1}), pruning.ratio).step()
            export_onnx(network, SPEC, path)
            return
        master = make("fp32", preset)
        if precision == "fp16":
            convert_to_fp16(master, path, pixels[:2])
        elif precision == "int8-dynamic":
            convert_to_dynamic_int8(master, path)
        else:
            rest = "fp16" if precision == "int8-fp16" else "fp32"
            convert_to_int8(master, path, pixels, method="max", rest=rest)

    return make
