"""`--precision best`: all are built and measured, the fastest one is published with the comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from click.testing import Result

from builder.compile import measurement, selection
from builder.compile.measurement import Speed
from builder.compile.packages import Package, build_package
from builder.compile.publication import PublicationError
from builder.compile.selection import build_best
from builder.compile.targets.base import Artefact, CompileError, Target
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate, GateError
from builder.kit import GraphSource, Kit, Report, Rest
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Preparation, open_checkpoint, prepare
from runtime.jetson import Power
from runtime.loading import load_engine
from runtime.manifest import Backend, BatchSizes, EngineError, LeftOut, read_manifest

LENIENT = Gate(max_drop=0.02, min_agreement=0.95)
BATCH = BatchSizes(min=1, opt=8, max=16)


def best_of(source: GraphSource, output: Path, gate: Gate, target: Target | None = None) -> Package:
    return build_best(
        source,
        target or open_target("openvino"),
        output,
        batch=BATCH,
        gate=gate,
        command="",
        report=lambda _: None,
    )


class Refusing:
    """OpenVINO's compiler, which refuses some graphs as TensorRT does where memory is short."""

    backend: Backend = "openvino"

    def __init__(self, *names: str) -> None:
        self._names = names
        self._target = open_target("openvino")
        self.asked: list[str] = []

    def compile(self, graph: Path, folder: Path, batch: BatchSizes, report: Report) -> Artefact:
        self.asked.append(graph.name)
        if graph.name.startswith(self._names):
            raise CompileError(f"no implementation of a layer of {graph.name} was found")
        return self._target.compile(graph, folder, batch, report)

    def missing_device(self) -> str | None:
        return None


def test_the_fastest_that_passes_is_published_with_the_comparison(
    kit: Kit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    result = trimrt(
        *("build", kit.path, "-p", "best", "--target", "openvino", "-o", tmp_path),
        *("--max-drop", 2, "--min-agreement", 95),
    )
    assert result.exit_code == 0, result.output
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    manifest = load_engine(folder).manifest
    measured = {candidate.precision: candidate for candidate in manifest.candidates}
    assert set(measured) == {"fp32", "int8"}
    assert all(candidate.refused is None for candidate in measured.values())
    assert manifest.evidence is not None
    assert manifest.evidence.latency_ms == measured[manifest.precision].latency_ms, "timed in turns, once"
    fastest = min(measured.values(), key=lambda candidate: candidate.latency_ms or 0)
    assert manifest.precision == fastest.precision
    assert folder.name == f"tiny-digits-{fastest.precision}-openvino"
    assert "--precision best" in manifest.build_command


def test_what_the_gate_refuses_is_not_chosen_however_fast(kit: Kit, tmp_path: Path, monkeypatch) -> None:
    class RefusesInt8(Gate):
        def check(self, comparison) -> None:
            if comparison.max_logit_difference > 0.05:  # FP32 stays far below it, INT8 does not
                raise GateError("as the test asked")

    package = best_of(kit, tmp_path, RefusesInt8())
    assert package.manifest.precision == "fp32"
    refused = {candidate.precision: candidate.refused for candidate in package.manifest.candidates}
    assert refused["fp32"] is None
    assert "as the test asked" in str(refused["int8"])


def test_if_neither_passes_nothing_is_published(kit: Kit, tmp_path: Path) -> None:
    impossible = Gate(max_drop=-1)
    with pytest.raises(GateError, match=r"(?s)fp32-openvino was not.*int8-openvino was not"):
        best_of(kit, tmp_path, impossible)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_finished_is_published_though_another_cannot_be_built(
    kit: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = best_of(kit, tmp_path, LENIENT, Refusing("int8"))
    assert read_manifest(package.folder).precision == "fp32"
    refused = {candidate.precision: candidate.refused for candidate in package.manifest.candidates}
    assert refused["fp32"] is None
    assert "no implementation" in str(refused["int8"])
    (warning,) = caplog.records
    assert (warning.levelno, warning.getMessage()[:21]) == (logging.WARNING, "int8 is not compared:")


def test_where_nothing_can_be_built_the_compilers_reasons_are_given(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"(?s)of fp32\.onnx was found.*of int8-.* was found"):
        best_of(kit, tmp_path, LENIENT, Refusing("fp32", "int8"))
    assert list(tmp_path.iterdir()) == []


def test_engines_that_do_not_run_at_once_are_compared_by_what_each_took_alone(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measure_in_turns(_engines: object) -> list[Speed]:
        raise EngineError("cudaMalloc: cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(selection, "measure_in_turns", measure_in_turns)
    package = best_of(kit, tmp_path, LENIENT)
    latencies = {candidate.latency_ms for candidate in package.manifest.candidates}
    assert None not in latencies
    assert read_manifest(package.folder).evidence is not None
    assert "not all run at once: cudaMalloc" in caplog.text


def test_a_package_of_another_network_in_the_way_is_told_before_anything_is_built(
    kit: Kit, tmp_path: Path
) -> None:
    (tmp_path / "tiny-digits-int8-openvino").mkdir()
    target = Refusing()
    with pytest.raises(PublicationError, match="tiny-digits-int8-openvino"):
        best_of(kit, tmp_path, LENIENT, target)
    assert target.asked == []


def test_int8_is_published_though_what_it_would_be_compared_with_cannot_be_built(
    kit: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = Refusing("fp32")
    package = build_package(
        *(kit, target, "int8", tmp_path),
        batch=BATCH,
        gate=LENIENT,
        command="",
        report=lambda _: None,
    )
    assert read_manifest(package.folder).precision == "int8"
    assert package.slower is None
    assert target.asked[-1] == "fp32.onnx"
    assert "int8 was not compared with fp32: no implementation" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "chosen"), [("latency", "fp32"), ("throughput", "int8")])
def test_the_objective_decides_what_is_fast(
    kit: Kit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trimrt: Callable[..., Result],
    objective,
    chosen,
) -> None:
    speeds = [
        Speed(latency_ms=1, throughput=2000, least_ms=1),
        Speed(latency_ms=2, throughput=9000, least_ms=2),
    ]  # FP32, INT8
    monkeypatch.setattr("builder.compile.selection.measure_in_turns", lambda _engines: speeds)
    result = trimrt(
        *("build", kit.path, "-p", "best", "--objective", objective, "--target", "openvino", "-o", tmp_path),
        *("--max-drop", 2, "--min-agreement", 95),
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / f"tiny-digits-{chosen}-openvino")
    assert {candidate.throughput for candidate in manifest.candidates} == {2000, 9000}
    assert ("--objective throughput" in manifest.build_command) == (objective == "throughput")


def test_what_else_the_machine_does_does_not_decide_which_engine_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first engine is the faster one, and most of its rounds are disturbed."""
    loads = {"faster": iter([9.0, 9, 1, 9, 9, 9, 9]), "slower": iter([1.0, 1, 1, 2, 1, 1, 1])}
    alone = {"faster": 2.0, "slower": 3.0}

    def measure(engine: Any, _slots: object, _rounds: int) -> Speed:
        latency = alone[engine.name] * next(loads[engine.name])
        return Speed(latency_ms=latency, throughput=1000 / latency, least_ms=latency)

    monkeypatch.setattr(measurement, "TimedSlots", lambda _engine, _count: ExitStack())
    monkeypatch.setattr(measurement, "_measure", measure)
    engines: list[Any] = [SimpleNamespace(name=name, slots=1) for name in ("faster", "slower")]
    speeds = measurement.measure_in_turns(engines)
    assert [speed.latency_ms for speed in speeds] == [2, 3]
    assert [speed.throughput for speed in speeds] == [1000 / 2, 1000 / 3]


@pytest.fixture(scope="module")
def preparation(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    options = PrepareOptions(calibration_images=64, calibration="max")
    subject = open_checkpoint(checkpoint, data=None)
    return prepare(subject, tmp_path_factory.mktemp("workspace"), options, lambda _: None)


@pytest.fixture
def all_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO compares what GPUs do, which cannot run here."""
    left_out: dict[Rest, tuple[LeftOut, ...]] = {"fp32": get_args(LeftOut)}
    monkeypatch.setattr(selection, "LEFT_OUT", left_out)


@pytest.mark.usefixtures("all_left_out")
@pytest.mark.slow
def test_int8_that_leaves_more_in_floating_point_is_chosen_where_it_is_fastest(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = [
        *[Speed(latency_ms=2, throughput=1000, least_ms=2)] * 3,
        Speed(latency_ms=1, throughput=2000, least_ms=1),
    ]
    monkeypatch.setattr(selection, "measure_in_turns", lambda _engines: speeds)
    package = best_of(preparation, tmp_path, LENIENT)
    manifest = read_manifest(package.folder)
    assert manifest.name == "tiny-digits-int8-openvino"
    names = ["fp32", "int8", "int8, residual sums left out", "int8, first layer left out"]
    assert [candidate.name for candidate in manifest.candidates] == names
    calibration = manifest.provenance.calibration
    assert calibration is not None
    assert calibration.left_out == "first layer"


@pytest.mark.usefixtures("all_left_out")
@pytest.mark.slow
def test_a_kit_without_such_graphs_is_compared_without_them(kit: Kit, tmp_path: Path) -> None:
    package = best_of(kit, tmp_path, LENIENT)
    refused = [candidate.refused for candidate in package.manifest.candidates if candidate.left_out]
    assert ["left out" in str(reason) for reason in refused] == [True, True]


def test_on_gpus_each_of_them_is_compared_and_on_cpus_none() -> None:
    """Both were slower on a CPU (docs/cpus.md)."""
    whole = [("fp16", None), ("int8", None)]
    assert selection._choices("tensorrt") == [*whole, ("int8", "residual sums"), ("int8", "first layer")]
    assert selection._choices("openvino") == [("fp32", None), ("int8", None)]


def test_the_power_mode_is_recorded_with_the_figures(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trimrt: Callable[..., Result]
) -> None:
    mode = Power(mode="25W", gpu_max_hz=918_000_000, gpu_fixed=True, cpu_max_hz=1_344_000_000, cores=6)
    monkeypatch.setattr("builder.compile.packages.power", lambda: mode)
    result = trimrt("build", kit.path, "-p", "fp32", "--target", "openvino", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "tiny-digits-fp32-openvino"
    evidence = read_manifest(folder).evidence
    assert evidence is not None
    assert evidence.power == mode
    assert "mode 25W; GPU up to 918 MHz, held there" in " ".join(trimrt("inspect", folder).output.split())
