"""Which layers suffer from INT8, and a network that only INT8 with exceptions can carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from builder.compile import packages
from builder.compile.measurement import Speed
from builder.compile.packages import Package, build_package
from builder.compile.targets.base import Target
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate, GateError
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Preparation, open_checkpoint, prepare
from builder.prepare.sensitivity import LayerCost, fallback_groups
from experiments.qat import BLOCKS, write_outliers
from runtime.manifest import BatchSizes


@pytest.fixture(scope="module")
def fragile(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(checkpoint, tmp_path_factory.mktemp("fragile") / "fragile")


@pytest.fixture(scope="module")
def preparation(fragile: Path, tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    options = PrepareOptions(calibration_images=64, calibration="max", sensitivity=True)
    subject = open_checkpoint(fragile, data=None)
    return prepare(subject, tmp_path_factory.mktemp("workspace"), options, lambda _: None)


def test_the_costliest_layers_are_those_that_read_the_outliers(preparation: Preparation) -> None:
    costs = preparation.layer_costs
    weights = {
        node.name: node.input[1] for node in _nodes(preparation.master) if node.op_type in ("Conv", "Gemm")
    }
    worst = {weights[cost.layer].removeprefix("network/") for cost in costs[: len(BLOCKS)]}
    assert worst == {f"{block}.conv2.weight" for block in BLOCKS}
    assert costs[1].error > 5 * costs[2].error, "and by far"
    assert [cost.error for cost in costs] == sorted((cost.error for cost in costs), reverse=True)


def test_every_quantised_layer_is_ranked(preparation: Preparation) -> None:
    quantised = next(path for _, path in preparation.graphs("int8", "fp32"))
    producers = {name: node.op_type for node in _nodes(quantised) for name in node.output}
    layers = {
        node.name
        for node in _nodes(quantised)
        if node.op_type in ("Conv", "Gemm")
        and all(producers.get(name) == "DequantizeLinear" for name in node.input[:2])
    }
    assert {cost.layer for cost in preparation.layer_costs} == layers
    assert len(layers) >= 20


@pytest.fixture
def rtx_target() -> Target:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")
    return open_target("tensorrt-rtx")


def build(preparation: Preparation, target: Target, output: Path) -> Package:
    return build_package(
        preparation,
        target,
        "int8",
        output,
        batch=BatchSizes(min=1, opt=8, max=16),
        gate=Gate(),
        command="trimrt build",
        report=lambda _: None,
    )


def test_int8_alone_fails_the_gate_and_nothing_is_published(
    preparation: Preparation, rtx_target: Target, tmp_path: Path
) -> None:
    without = replace(preparation, options=preparation.options.model_copy(update={"sensitivity": False}))
    with pytest.raises(GateError, match=r"fragile-int8-tensorrt-rtx was not published. max: top-1 falls by"):
        build(without, rtx_target, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_costliest_layers_in_fp16_rescue_it(
    preparation: Preparation, rtx_target: Target, tmp_path: Path
) -> None:
    package = build(preparation, rtx_target, tmp_path)
    calibration = package.manifest.provenance.calibration
    assert calibration is not None
    kept = calibration.higher_precision_layers
    assert kept == [cost.layer for cost in preparation.layer_costs[: len(kept)]]
    assert 1 <= len(kept) <= len(BLOCKS)
    assert calibration.tried[0] == "max"
    assert len(package.rejected) == len(calibration.tried)


@pytest.mark.parametrize(("int8_ms", "published"), [(0.5, True), (2.0, False)])
def test_layers_are_kept_only_while_int8_is_faster(
    preparation: Preparation, tmp_path: Path, monkeypatch, int8_ms: float, published: bool
) -> None:
    """The clock is the test's: what a tiny network really takes on a busy machine decides nothing."""

    def measure(engines) -> list[Speed]:
        latencies = [int8_ms if engine.manifest.precision == "int8" else 1.0 for engine in engines]
        return [Speed(latency_ms=latency, throughput=1000 / latency) for latency in latencies]

    monkeypatch.setattr(packages, "measure_in_turns", measure)
    target = open_target("openvino")
    if published:
        package = build(preparation, target, tmp_path)
        assert package.manifest.provenance.calibration.higher_precision_layers
    else:
        with pytest.raises(GateError, match="accurate but not faster than fp32"):
            build(preparation, target, tmp_path)
    assert (tmp_path / "fragile-int8-openvino").exists() == published


def test_the_command_prints_the_ranking_and_builds_with_it(
    checkpoint: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    result = trimrt(
        *("build", checkpoint, "--target", "openvino", "-p", "int8", "-o", tmp_path, "--sensitivity"),
        *("--calibration", "max", "--calibration-images", 32, "--max-drop", 2, "--min-agreement", 95),
    )
    assert result.exit_code == 0, result.output
    assert "logit error if quantised alone" in result.output
    ranked = [line.split() for line in result.output.splitlines() if line.strip().startswith("network/")]
    errors = [float(line[-1].rstrip("%")) for line in ranked]
    assert len(errors) >= 20
    assert errors == sorted(errors, reverse=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_groups_grow_from_one_layer_to_half_of_them(errors: list[float]) -> None:
    costs = [LayerCost(f"layer{index}", error) for index, error in enumerate(errors)]
    groups = list(fallback_groups(costs))
    sizes = [len(group) for group in groups]
    assert sizes[0] == 1
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max(1, len(costs) // 2)
    assert all(group == [cost.layer for cost in costs[: len(group)]] for group in groups)


def _nodes(path: Path):
    import onnx

    return onnx.load(str(path)).graph.node


def test_in_floating_point_the_fragile_network_is_the_student(
    checkpoint: Path, preparation: Preparation
) -> None:
    expected = preparation.verification
    logits = open_checkpoint(checkpoint, data=None).reference(expected.pixels[:128])
    np.testing.assert_allclose(expected.logits[:128], logits, rtol=1e-3, atol=1e-3)
