"""Which layers suffer from INT8, and a network that only INT8 with exceptions can carry."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
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
from builder.prepare.sensitivity import BUDGETS, LayerCost, worthwhile_groups
from experiments.qat import BLOCKS, write_outliers
from runtime.manifest import BatchSizes


@pytest.fixture(scope="module")
def fragile(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(checkpoint, tmp_path_factory.mktemp("fragile") / "fragile")


# What else would rescue it.
NOTHING_ELSE = {"calibration": "max", "correction": False, "rounding": False}


@pytest.fixture(scope="module")
def ranking() -> list[LayerCost]:
    """Filled once the ladder gets that far."""
    return []


@pytest.fixture(scope="module")
def preparation(
    fragile: Path, ranking: list[LayerCost], tmp_path_factory: pytest.TempPathFactory
) -> Preparation:
    options = PrepareOptions(calibration_images=64, **NOTHING_ELSE)
    subject = open_checkpoint(fragile, data=None)
    workspace = tmp_path_factory.mktemp("workspace")
    return prepare(subject, workspace, options, lambda _: None, ranked=ranking.extend)


@pytest.fixture(scope="module")
def costs(preparation: Preparation, ranking: list[LayerCost]) -> list[LayerCost]:
    graphs = preparation.graphs("int8", "fp32")
    next(graphs)
    assert not ranking, "before a graph was refused"
    next(graphs)
    return ranking


def test_the_costliest_layers_are_those_that_read_the_outliers(
    preparation: Preparation, costs: list[LayerCost]
) -> None:
    weights = {
        node.name: node.input[1] for node in _nodes(preparation.master) if node.op_type in ("Conv", "Gemm")
    }
    worst = {weights[cost.layer].removeprefix("network/") for cost in costs[: len(BLOCKS)]}
    assert worst == {f"{block}.conv2.weight" for block in BLOCKS}
    assert costs[1].error > 5 * costs[2].error, "and by far"
    assert [cost.error for cost in costs] == sorted((cost.error for cost in costs), reverse=True)


def test_every_quantised_layer_is_ranked(preparation: Preparation, costs: list[LayerCost]) -> None:
    quantised = next(path for _, path in preparation.graphs("int8", "fp32"))
    producers = {name: node.op_type for node in _nodes(quantised) for name in node.output}
    layers = {
        node.name
        for node in _nodes(quantised)
        if node.op_type in ("Conv", "Gemm")
        and all(producers.get(name) == "DequantizeLinear" for name in node.input[:2])
    }
    assert {cost.layer for cost in costs} == layers
    assert len(layers) >= 20
    assert sum(cost.share for cost in costs) == pytest.approx(1, abs=0.01)


def test_layers_are_kept_whole_and_nothing_quantises_their_inputs_any_more(preparation: Preparation) -> None:
    (plain, _), *others = preparation.graphs("int8", "fp32")
    floats = {tensor.name: tensor for tensor in onnx.load(preparation.master).graph.initializer}
    shares = [plain.int8_share]
    for graph, path in others:
        nodes = {node.name: node for node in _nodes(path)}
        producers = {name: node.op_type for node in nodes.values() for name in node.output}
        constants = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
        for layer in graph.calibration.higher_precision_layers:
            source = next(node for node in _nodes(preparation.master) if node.name == layer)
            assert producers.get(nodes[layer].input[0]) != "DequantizeLinear"
            assert constants[nodes[layer].input[1]].raw_data == floats[source.input[1]].raw_data
        added = {name for node in nodes.values() if node.op_type == "Add" for name in node.input}
        assert "DequantizeLinear" not in {producers.get(name) for name in added}, "sums cost next to nothing"
        shares.append(graph.int8_share)
        assert graph.int8_share >= 1 - BUDGETS[len(shares) - 2] - 1e-3
    assert shares == sorted(shares, reverse=True)


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
    with pytest.raises(
        GateError, match=r"fragile-int8-tensorrt-rtx was not published\.\n  max .*top-1 falls by"
    ):
        build(without, rtx_target, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_costliest_layers_in_fp16_rescue_it(
    preparation: Preparation, costs: list[LayerCost], rtx_target: Target, tmp_path: Path
) -> None:
    package = build(preparation, rtx_target, tmp_path)
    calibration = package.manifest.provenance.calibration
    assert calibration is not None
    assert {cost.layer for cost in costs[: len(BLOCKS)]} <= set(calibration.higher_precision_layers)
    assert calibration.tried[0] == "max"
    assert len(package.rejected) == len(calibration.tried)


@pytest.mark.parametrize(("int8_ms", "published"), [(0.5, True), (2.0, False)])
def test_layers_are_kept_only_while_int8_is_faster(
    preparation: Preparation, tmp_path: Path, monkeypatch, int8_ms: float, published: bool
) -> None:
    """The clock is the test's: what a tiny network really takes on a busy machine decides nothing."""

    def measure(engines) -> list[Speed]:
        latencies = [int8_ms if engine.manifest.precision == "int8" else 1.0 for engine in engines]
        return [
            Speed(latency_ms=latency, throughput=1000 / latency, least_ms=latency) for latency in latencies
        ]

    monkeypatch.setattr(packages, "measure_in_turns", measure)
    target = open_target("openvino")
    if published:
        package = build(preparation, target, tmp_path)
        assert package.manifest.provenance.calibration.higher_precision_layers
    else:
        with pytest.raises(GateError, match="accurate but not faster than fp32"):
            build(preparation, target, tmp_path)
    assert (tmp_path / "fragile-int8-openvino").exists() == published


@pytest.mark.slow
def test_the_command_prints_the_ranking_and_what_was_tried(
    fragile: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    result = trimrt(
        *("build", fragile, "--target", "openvino", "-p", "int8", "-o", tmp_path, "--calibration", "max"),
        *("--calibration-images", 32, "--no-correction", "--no-rounding"),
    )
    assert "logit error if quantised alone" in result.output
    ranked = [line.split() for line in result.output.splitlines() if line.strip().startswith("network/")]
    errors = [float(line[-1].rstrip("%")) for line in ranked]
    assert len(errors) >= 20
    assert errors == sorted(errors, reverse=True)
    assert re.search(r"max \(\d+ s\): top-1 falls by", result.output)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.001, 1)), min_size=1, max_size=60))
def test_groups_grow_and_stay_within_their_budgets(layers: list[tuple[float, float]]) -> None:
    total = sum(share for _, share in layers)
    costs = [LayerCost(f"layer{index}", error, share / total) for index, (error, share) in enumerate(layers)]
    shares = {cost.layer: cost.share for cost in costs}
    spent = [sum(shares[layer] for layer in group) for group in worthwhile_groups(costs)]
    assert len(spent) <= len(BUDGETS)
    assert all(share <= BUDGETS[-1] + 1e-9 for share in spent)


def test_a_layer_that_hurts_much_and_computes_little_is_kept_first() -> None:
    costs = [LayerCost("large", 0.3, 0.9), LayerCost("small", 0.2, 0.02), LayerCost("harmless", 0.0, 0.08)]
    assert next(worthwhile_groups(costs)) == ["small"]


def _nodes(path: Path):
    return onnx.load(str(path)).graph.node


def test_in_floating_point_the_fragile_network_is_the_student(
    checkpoint: Path, preparation: Preparation
) -> None:
    expected = preparation.verification
    logits = open_checkpoint(checkpoint, data=None).reference(expected.pixels[:128])
    np.testing.assert_allclose(expected.logits[:128], logits, rtol=1e-3, atol=1e-3)
