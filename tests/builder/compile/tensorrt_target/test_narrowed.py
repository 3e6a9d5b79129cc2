"""Narrowed graphs through the real TensorRT-RTX builder, as a Jetson compiles them to be timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder.compile.narrowing.channels import NarrowableGraph
from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.options import TensorRTOptions
from runtime.manifest import BatchSizes
from runtime.tensorrt.library import TensorRTLibrary

ONE = [BatchSizes(min=1, opt=1, max=1)]


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.slow), "int8-fp16"])
def test_narrowed_graphs_compile(
    rtx: TensorRTLibrary, graph: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    narrowable = NarrowableGraph(graph(precision).read_bytes())
    widths = {group.name: 16 for group in narrowable.groups}
    for number, wider in enumerate(({}, {"layer2.0.conv2": 128, "layer3.0.conv1": 96})):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(narrowable.narrowed(widths | wider))
        plan = build_engine(rtx, path, TensorRTOptions(profiles=ONE), BuildResources(workspace=1 << 30))
        assert plan.startswith(b"vtrt")
