"""Compiling with the real TensorRT-RTX builder, which needs no GPU."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from typing import Final

import onnx
import pytest
from rich.console import Console
from rich.progress import Progress

from builder.compile.targets.base import CompileError
from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.options import TensorRTOptions, UnsupportedOptionError
from builder.compile.targets.tensorrt.progress import RichListener
from builder.prepare.legality import check_legality
from models.recipe import PRESETS
from runtime.manifest import BatchSizes

DYNAMIC = [BatchSizes(min=1, opt=8, max=32)]
FIXED = [BatchSizes(min=8, opt=8, max=8)]
TWO = [BatchSizes(min=1, opt=1, max=1), BatchSizes(min=2, opt=8, max=32)]
PROFILES = {"dynamic batch": DYNAMIC, "fixed batch": FIXED, "two profiles": TWO}
PRECISIONS = ["fp32", "fp16", "int8-fp16", "int8-fp32", "int8-dynamic"]
RESOURCES = BuildResources(workspace=1 << 30)


def compile_graph(rtx, path, profiles=DYNAMIC, listener=None, resources=RESOURCES, **options) -> bytes:
    return build_engine(rtx, path, TensorRTOptions(profiles=profiles, **options), resources, listener)


@pytest.fixture(scope="module")
def plan(rtx, graph):
    """`plan(precision, profiles)`: an engine, compiled once."""
    return cache(lambda precision, profiles: compile_graph(rtx, graph(precision), PROFILES[profiles]))


class Recording:
    """A listener that remembers, and may interfere at the first step."""

    def __init__(self, at_first_step=lambda: None) -> None:
        self.events: list[tuple[object, ...]] = []
        self._at_first_step = [at_first_step]  # popped by one of TensorRT's threads alone

    def started(self, phase, parent, steps):
        self.events.append(("started", phase, parent, steps))

    def advanced(self, phase, step):
        self.events.append(("advanced", phase, step))
        with suppress(IndexError):
            self._at_first_step.pop()()

    def finished(self, phase):
        self.events.append(("finished", phase))


# What must compile


@pytest.mark.parametrize("profiles", PROFILES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_compiles_with_every_kind_of_profile(plan, precision, profiles):
    assert plan(precision, profiles).startswith(b"vtrt")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-fp16"])
@pytest.mark.parametrize("preset", ["aligned", "report", "aggressive"])
@pytest.mark.slow
def test_every_pruning_preset_compiles(rtx, graph, preset, precision):
    path = graph(precision, preset)
    assert check_legality(onnx.load(path)).errors == []
    assert compile_graph(rtx, path).startswith(b"vtrt")


def test_no_other_preset_prunes_differently():
    shapes = {name: settings.get("pruning", {}) for name, (_, settings) in PRESETS.items()}
    kinds = {(shape.get("ratio"), shape.get("round_to"), shape.get("scope")) for shape in shapes.values()}
    assert len(kinds) == 3, "a new way to prune needs its line in the test above"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_graph_of_ours_is_refused_by_our_checker(graph, precision):
    assert check_legality(onnx.load(graph(precision))).errors == []


@pytest.mark.parametrize(
    ("profiles", "int8_share"), [("dynamic batch", 0.33), ("fixed batch", 0.33), ("two profiles", 0.4)]
)
def test_lower_precision_makes_smaller_engines(plan, profiles, int8_share):
    size = {
        precision: len(plan(precision, profiles)) for precision in ("fp32", "fp16", "int8-fp16", "int8-fp32")
    }
    assert size["fp16"] <= 0.55 * size["fp32"]
    assert size["int8-fp16"] <= int8_share * size["fp32"]
    assert size["int8-fp32"] <= int8_share * size["fp32"]


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 5, "profiling": "detailed"},
        {"aux_streams": 0, "tf32": False, "sparsity": True, "profiling": "none"},
        {"compute_capabilities": ["7.5", "8.6", "12.0"]},
    ],
)
def test_options_reach_a_builder_that_takes_them(rtx, graph, options):
    assert compile_graph(rtx, graph("int8-fp16"), **options).startswith(b"vtrt")


# Progress


def test_phases_are_nested_and_complete(rtx, graph):
    listener = Recording()
    compile_graph(rtx, graph("fp32"), listener=listener)
    kind, outermost, parent, steps = listener.events[0]
    assert (kind, parent) == ("started", None)
    assert listener.events[-1] == ("finished", outermost)
    started = [event[1] for event in listener.events if event[0] == "started"]
    finished = [event[1] for event in listener.events if event[0] == "finished"]
    assert sorted(started) == sorted(finished)
    assert len(started) > 3
    done = [event[2] for event in listener.events if event[:2] == ("advanced", outermost)]
    assert done == list(range(len(done)))
    assert 1 < len(done) <= steps


def test_progress_bars_end_complete_and_alone(rtx, graph):
    with Progress(console=Console(quiet=True)) as progress:
        compile_graph(rtx, graph("fp32"), listener=RichListener(progress))
    (task,) = progress.tasks
    assert task.finished


# Stopping


def test_what_a_listener_raises_ends_the_build(rtx, graph, tmp_path):
    def fail():
        raise OSError("the terminal is gone")

    listener = Recording(fail)
    log = BuildResources(workspace=1 << 30, log=tmp_path / "build.log")
    with pytest.raises(OSError, match="the terminal is gone"):
        compile_graph(rtx, graph("fp32"), listener=listener, resources=log)
    assert "cancel" in (tmp_path / "build.log").read_text().lower()
    assert compile_graph(rtx, graph("fp16")).startswith(b"vtrt"), "the next build works"


INTERRUPTED: Final = """
import signal, sys, threading
from pathlib import Path
from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.options import TensorRTOptions
from runtime.manifest import BatchSizes
from runtime.tensorrt.library import load_tensorrt

class CtrlC:
    sent = False
    def started(self, *_): ...
    def finished(self, *_): ...
    def advanced(self, *_):
        if not self.sent:
            self.sent = True
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

library, resources = load_tensorrt("tensorrt-rtx"), BuildResources(workspace=1 << 30)
options = TensorRTOptions(profiles=[BatchSizes(min=1, opt=8, max=32)])
try:
    build_engine(library, Path(sys.argv[1]), options, resources, CtrlC())
except KeyboardInterrupt:
    left = [thread.name for thread in threading.enumerate() if "tensorrt-build" in thread.name]
    sys.exit(f"interrupted, {len(left)} threads left")
"""


@pytest.mark.usefixtures("rtx")
def test_ctrl_c_ends_the_build(graph):
    """In a process of its own, for TensorRT-RTX 1.7.1 sometimes crashes there, in a thread of its own."""
    command = [sys.executable, "-c", INTERRUPTED, str(graph("fp32"))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    crashed = ended.returncode == -signal.SIGSEGV
    assert crashed or ended.stderr.strip().endswith("interrupted, 0 threads left"), ended.stderr


# Failures


def test_the_log_is_kept(rtx, graph, tmp_path):
    compile_graph(rtx, graph("fp32"), resources=BuildResources(workspace=1 << 30, log=tmp_path / "build.log"))
    assert "INFO" in (tmp_path / "build.log").read_text()


def test_too_small_a_workspace_is_told_in_tensorrts_words(rtx, graph, tmp_path):
    resources = BuildResources(workspace=1024, log=tmp_path / "build.log")
    with pytest.raises(CompileError, match=r"(?is)tensorrt-rtx 1\..*did not build.*memory"):
        compile_graph(rtx, graph("fp32"), [BatchSizes(min=1, opt=64, max=512)], resources=resources)
    assert "ERROR" in (tmp_path / "build.log").read_text()


def test_a_profile_out_of_order_is_refused(rtx, graph):
    backwards = BatchSizes.model_construct(min=4, opt=2, max=8)  # our own models do not let it pass
    options = TensorRTOptions().model_copy(update={"profiles": [backwards]})
    with pytest.raises(CompileError, match=r"profile 4\.\.2\.\.8 was refused"):
        build_engine(rtx, graph("fp32"), options, RESOURCES)


def test_a_truncated_graph_is_refused(rtx, graph, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(graph("fp32").read_bytes()[:100_000])
    with pytest.raises(CompileError, match="the graph was rejected"):
        compile_graph(rtx, broken)


def test_an_illegal_graph_is_refused_by_name(rtx, graph, tmp_path):
    model = onnx.load(graph("int8-fp32"))
    quantise = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    zero = next(tensor for tensor in model.graph.initializer if tensor.name == quantise.input[2])
    zero.CopyFrom(onnx.helper.make_tensor(zero.name, zero.data_type, list(zero.dims), [3]))
    onnx.save(model, tmp_path / "asymmetric.onnx")
    with pytest.raises(CompileError, match=f"{quantise.name}.*zero point"):
        compile_graph(rtx, tmp_path / "asymmetric.onnx")
    assert any("zero point" in finding.message for finding in check_legality(model).errors)


def test_a_graph_of_fixed_batch_compiles_for_that_batch_only(rtx, graph, tmp_path):
    model = onnx.load(graph("fp32"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "fixed.onnx")
    four = BatchSizes(min=4, opt=4, max=4)
    assert compile_graph(rtx, tmp_path / "fixed.onnx", [four]).startswith(b"vtrt")
    with pytest.raises(CompileError, match="fixed at 4; ask for --profile 4:4:4"):
        compile_graph(rtx, tmp_path / "fixed.onnx", FIXED)


def test_images_of_dynamic_size_are_refused(rtx, graph, tmp_path):
    model = onnx.load(graph("fp32"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    onnx.save(model, tmp_path / "dynamic.onnx")
    with pytest.raises(CompileError, match="only the first dimension of images may be dynamic"):
        compile_graph(rtx, tmp_path / "dynamic.onnx")


def test_an_unknown_gpu_is_refused_before_anything_is_built(rtx, graph):
    listener = Recording()
    with pytest.raises(UnsupportedOptionError, match=r"8\.7, only for 7\.5, 8\.0"):
        compile_graph(rtx, graph("fp32"), listener=listener, compute_capabilities=["8.7"])
    assert listener.events == []
