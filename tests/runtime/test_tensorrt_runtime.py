"""The TensorRT runtime's threads, buffers, graphs, checks and failures, against a recording stand-in.

Nothing here shows that a plan runs on a GPU; `tests/gpu` does, on a machine that has one.
"""

from __future__ import annotations

import inspect
import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count as counter
from pathlib import Path

import numpy as np
import pytest
import recording_cuda
from PIL import Image
from recorded_machine import CLASSES, PLAN, REBUILD, SIZE, Machine, trt, write_package
from recording_cuda import (
    DESKTOP,
    ORIN,
    RecordingContext,
    RecordingCuda,
    RecordingEngine,
    RecordingRuntime,
    logits_of,
    probabilities_of,
)
from running import running

from runtime.cuda import Cuda, DeviceLostError
from runtime.engine import Options
from runtime.loading import load_engine
from runtime.manifest import BatchSizes, EngineError
from runtime.profiling import profile_layers
from runtime.tensorrt.compatibility import driver_version
from runtime.tensorrt.layers import PlanLayer, write_layers
from server.settings import Settings


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch, RecordingCuda())


@pytest.fixture
def package(tmp_path) -> Path:
    return write_package(tmp_path / "package")


def fill(slot, count: int, seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    slot.pixels[:count] = pixels
    return pixels


def check_batch(slot, count: int, seed: int) -> None:
    """One batch gives its own images' results, and none of the batch before."""
    expected = logits_of(fill(slot, count, seed), CLASSES)
    outputs = slot.infer(count)
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-6)
    np.testing.assert_allclose(outputs.probabilities, probabilities_of(expected), rtol=1e-6)


# The stand-ins are what they say


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [
        (RecordingContext, trt.IExecutionContext),
        (RecordingEngine, trt.ICudaEngine),
        (RecordingRuntime, trt.Runtime),
        (RecordingCuda, Cuda),
    ],
)
def test_a_stand_in_has_only_names_of_the_real_class(stand_in, real):
    own = {"calls", "fail", "lost", "names", "new_id", "in_use", "stream", "recorded"}
    names = {name for name in vars(stand_in) if not name.startswith("_")} - own
    assert names <= set(dir(real))
    assert names


def test_the_stand_in_takes_what_our_cuda_interface_takes():
    for name, method in inspect.getmembers(Cuda, inspect.isfunction):
        if not name.startswith("_"):
            wanted = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(RecordingCuda, name)).parameters) == wanted, name


# Running


@pytest.mark.parametrize("device", [DESKTOP, ORIN], ids=["graphics card", "Jetson"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_every_batch_gives_its_own_results(monkeypatch, tmp_path, device, graphs):
    machine = Machine(monkeypatch, RecordingCuda(device))
    package = write_package(tmp_path / "package", device=device)
    slot = load_engine(package, Options(cuda_graphs=graphs)).open_slot()
    sizes = [1, 8, 3, 3, 1, 8, 1, 1, 5, 3, 8, 2, 1]
    for seed, size in enumerate(sizes):
        check_batch(slot, size, seed)
    assert machine.cuda.names().count("launch") == (len(sizes) if graphs else 0)


def test_a_slot_is_opened_warm(machine, package):
    """Each size has run once and its graph was captured then, so every batch that follows is a replay."""
    slot = load_engine(package).open_slot()
    work = ("execute_async_v3", "capture", "launch")
    assert machine.cuda.names(*work) == 4 * ["execute_async_v3", "capture", "execute_async_v3"]
    assert len(machine.cuda.graphs) == 4
    assert machine.trt.contexts == 4, "each captured graph has a context of its own"
    del machine.cuda.calls[:]
    for count in range(1, 9):
        check_batch(slot, count, seed=count)
    assert machine.cuda.names(*work) == 8 * ["launch"]


def test_a_slot_whose_warm_up_fails_leaves_nothing_behind(machine, package):
    enqueued = counter()
    machine.trt.refuse = lambda: next(enqueued) == 4
    with pytest.raises(EngineError, match="refused a batch of 4: IExecutionContext::enqueueV3"):
        load_engine(package).open_slot()
    assert machine.cuda.in_use() == 0
    assert machine.cuda.attached[threading.get_ident()] == 0


@pytest.mark.parametrize(
    ("profiles", "sizes"),
    [
        ([(1, 8, 32)], [1, 2, 4, 8, 16, 32]),
        ([(1, 1, 1), (2, 8, 32)], [1, 2, 4, 8, 16, 32]),
        ([(3, 6, 12)], [4, 8, 12]),
        ([(5, 5, 5)], [5]),
    ],
)
def test_powers_of_two_and_the_largest_size_have_contexts(machine, tmp_path, profiles, sizes):
    machine.trt.profiles = profiles
    low, high = profiles[0][0], profiles[-1][2]
    batch = {"min": low, "opt": low, "max": high}
    engine = load_engine(write_package(tmp_path / "sizes", batch=BatchSizes(**batch)))
    assert list(engine.run_sizes) == sizes
    slot = engine.open_slot()
    assert machine.trt.contexts == len(sizes)
    for count in range(low, high + 1):
        check_batch(slot, count, seed=count)
    assert machine.trt.contexts == len(sizes), "every other batch ran in one of them"


def test_what_each_context_takes_is_logged_when_a_slot_is_opened(machine, package, caplog):
    free = iter(range(4 << 30, 0, -(3 << 20)))
    machine.cuda.memory = lambda: (next(free), 8 << 30)
    with caplog.at_level(logging.INFO, "trimrt.tensorrt"):
        load_engine(package).open_slot()
    (line,) = [record.message for record in caplog.records if "context and graph" in record.message]
    assert line.endswith("took: 3.0 for 1, 3.0 for 2, 3.0 for 4, 3.0 for 8")


@pytest.mark.parametrize(("device", "slots"), [(DESKTOP, 2), (ORIN, 1)], ids=["graphics card", "Jetson"])
def test_a_second_slot_is_for_what_is_copied(monkeypatch, tmp_path, device, slots):
    Machine(monkeypatch, RecordingCuda(device))
    package = write_package(tmp_path / "package", device=device)
    assert load_engine(package).slots == slots
    assert load_engine(package, Options(slots=3)).slots == 3


def test_the_thread_sleeps_while_the_gpu_works(machine, package):
    slot = load_engine(package).open_slot()
    del machine.cuda.calls[:]
    check_batch(slot, 4, 0)
    assert machine.cuda.names("wait", "synchronize") == ["wait"]


def test_only_the_batch_is_copied(machine, package):
    slot = load_engine(package).open_slot()
    del machine.cuda.calls[:]
    check_batch(slot, 3, 0)
    copied = [call.arguments[0] for call in machine.cuda.calls if call.name.startswith("copy_to")]
    assert copied == [3 * SIZE * SIZE * 3, 3 * CLASSES * 4, 3 * CLASSES * 4]


def test_on_a_jetson_nothing_is_copied(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, RecordingCuda(ORIN))
    slot = load_engine(write_package(tmp_path / "package", device=ORIN)).open_slot()
    check_batch(slot, 3, 0)
    assert machine.cuda.names("copy_to_device", "copy_to_host") == []


def test_the_stages_are_timed_by_events(machine, package):
    slot = load_engine(package).open_slot()
    for seed in range(2):
        fill(slot, 2, seed)
        assert slot.infer(2).timings_ms == {"h2d": 1.5, "compute": 1.5, "d2h": 1.5}


def test_without_graphs_in_the_cuda_interface_work_is_enqueued(monkeypatch, package):
    machine = Machine(monkeypatch, RecordingCuda(captures_graphs=False))
    slot = load_engine(package).open_slot()
    del machine.cuda.calls[:]
    for seed in range(3):
        check_batch(slot, 4, seed)
    assert machine.cuda.names("execute_async_v3", "capture", "launch") == ["execute_async_v3"] * 3


@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_batch_outside_the_profile_is_refused(machine, package, count):
    slot = load_engine(package).open_slot()
    with pytest.raises(ValueError, match=r"outside 1\.\.8"):
        slot.infer(count)


def test_each_size_runs_in_its_own_profile(machine, package):
    machine.trt.profiles = [(1, 1, 1), (4, 8, 8)]
    engine = load_engine(package)
    assert list(engine.run_sizes) == [1, 4, 8]
    slot = engine.open_slot()
    profiles = [c.arguments for c in machine.cuda.calls if c.name == "set_optimization_profile_async"]
    assert profiles == 2 * [(1,)], "a context starts with the first profile"
    for count in engine.run_sizes:
        check_batch(slot, count, seed=count)
    with pytest.raises(ValueError, match=r"outside 1\.\.1, 4\.\.8"):
        slot.infer(2)


def test_behind_the_server_every_size_is_captured_first_and_every_answer_has_the_device_stages(
    machine, tmp_path
):
    package = write_package(tmp_path / "digits-fp16-tensorrt")
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), "green").save(file, "PNG")
    with running(Settings(engine=package.name, engine_dir=tmp_path, port=0)) as server:
        assert len(machine.cuda.graphs) == 2 * 4, "for both slots, before it was ready"
        response = server.predict(file.getvalue())
        latency = response.json()["results"][0]["latency_ms"]
        stats = server.client.get("/stats").text
        metrics = server.client.get("/metrics").text
    assert [latency[stage] for stage in ("h2d", "compute", "d2h")] == [1.5, 1.5, 1.5]
    assert "compute;dur=1.500" in response.headers["Server-Timing"]
    assert '"h2d"' in stats
    assert 'stage="d2h"' in metrics


def test_layers_are_timed_batch_by_batch_without_graphs(machine, package):
    layers = [
        PlanLayer(
            name="first", kind="correlation", kernel="xmma", inputs=[], outputs=[], graph_layers=["conv1"]
        )
    ]
    write_layers(package, layers)
    timed = profile_layers(package, batch=3, runs=10)
    assert [(layer.name, layer.kind, layer.kernel, layer.mean_ms) for layer in timed] == [
        ("first", "correlation", "xmma", 0.5),
        ("second", "", "", 0.25),
    ]
    assert machine.cuda.names("launch") == []
    assert machine.cuda.in_use() == 0


# Threads


def test_a_slot_is_one_threads_own(machine, package):
    engine = load_engine(package, Options(slots=4))
    del machine.cuda.calls[:]
    meet = threading.Barrier(4)

    def serve(worker: int) -> int:
        slot = engine.open_slot()
        meet.wait(timeout=30)
        for round_ in range(40):
            check_batch(slot, 1 + (worker + round_) % 8, seed=1000 * worker + round_)
        slot.close()
        return threading.get_ident()

    with ThreadPoolExecutor(4) as workers:
        threads = set(workers.map(serve, range(4)))
    assert len(threads) == 4
    assert {call.thread for call in machine.cuda.calls} == threads
    assert machine.cuda.in_use() == 0
    assert all(depth == 0 for depth in machine.cuda.attached.values())


def test_a_slot_attaches_its_thread_once(machine, package):
    engine = load_engine(package)
    del machine.cuda.calls[:]
    slot = engine.open_slot()
    for seed in range(5):
        check_batch(slot, 2, seed)
    assert machine.cuda.names("attach_thread", "detach_thread") == ["attach_thread"]
    slot.close()
    assert machine.cuda.names("attach_thread", "detach_thread") == ["attach_thread", "detach_thread"]


def test_loading_leaves_its_thread_as_it_was(machine, package):
    load_engine(package).close()
    assert machine.cuda.attached[threading.get_ident()] == 0


# Failures


def test_a_refused_batch_is_an_error_and_the_next_one_is_right(machine, package):
    slot = load_engine(package, Options(cuda_graphs=False)).open_slot()
    machine.trt.refuse = lambda: True
    fill(slot, 4, 0)
    with pytest.raises(EngineError, match="refused a batch of 4: IExecutionContext::enqueueV3"):
        slot.infer(4)
    machine.trt.refuse = lambda: False
    for seed in range(1, 4):
        check_batch(slot, 4, seed)


def test_a_batch_that_tensorrt_refuses_since_its_gpu_is_gone_says_so(machine, package):
    slot = load_engine(package, Options(cuda_graphs=False)).open_slot()

    def lose() -> bool:
        machine.cuda.lost = True
        return True

    machine.trt.refuse = lose
    fill(slot, 4, 0)
    with pytest.raises(DeviceLostError, match="synchronize: cudaErrorIllegalAddress"):
        slot.infer(4)


def test_a_slot_of_a_gpu_that_is_gone_is_closed_all_the_same(machine, package, caplog):
    slot = load_engine(package).open_slot()
    machine.cuda.lost = True
    slot.close()
    assert "while a slot was closed" in caplog.text


def test_an_engine_of_a_gpu_that_is_gone_is_closed_all_the_same(machine, package, caplog):
    engine = load_engine(package)
    machine.cuda.lost = True
    engine.close()
    assert f"while {engine.manifest.name} was closed: attach_thread" in caplog.text


def test_what_cannot_be_captured_runs_without_graphs(machine, package, caplog):
    enqueued = counter()
    machine.trt.refuse = lambda: next(enqueued) == 1  # the first run works, its capture does not
    slot = load_engine(package).open_slot()
    for seed in range(3):
        check_batch(slot, 4, seed)
    assert machine.cuda.graphs == {}
    assert machine.cuda.names("launch") == []
    assert [record.message for record in caplog.records if "without CUDA graphs" in record.message]


@pytest.mark.parametrize("call", ["copy_to_device", "launch", "copy_to_host", "wait", "record"])
def test_after_a_cuda_error_no_graph_is_left_and_the_next_batch_is_right(machine, package, call):
    slot = load_engine(package).open_slot()
    for seed in range(2):
        check_batch(slot, 4, seed)
    failures = iter([True])
    machine.cuda.fail[call] = lambda: next(failures, False)
    fill(slot, 4, 5)
    with pytest.raises(EngineError, match=f"{call}: cudaErrorUnknown"):
        slot.infer(4)
    assert machine.cuda.graphs == {}
    for seed in range(6, 9):
        check_batch(slot, 4, seed)
    slot.close()
    assert machine.cuda.in_use() == 0


@pytest.mark.parametrize(
    ("call", "nth"),
    [
        ("create_stream", 0),
        ("create_event", 0),
        ("create_event", 3),
        ("allocate", 0),
        ("allocate", 3),
        ("allocate_host", 0),
        ("allocate_host", 2),
        ("device", 0),
        ("memory", 0),
    ],
)
def test_a_slot_that_cannot_be_opened_leaves_nothing_behind(machine, package, call, nth):
    engine = load_engine(package)
    calls = counter()
    machine.cuda.fail = {call: lambda: next(calls) == nth}
    with pytest.raises(EngineError, match=f"^{call}: cudaErrorUnknown"):
        engine.open_slot()
    assert machine.cuda.in_use() == 0
    assert machine.cuda.attached[threading.get_ident()] == 0


def test_closing_frees_everything(machine, package):
    slot = load_engine(package).open_slot()
    for size in (1, 2, 8, 8):
        check_batch(slot, size, size)
    assert machine.cuda.in_use() > 10
    slot.close()
    assert machine.cuda.in_use() == 0


def test_a_closed_engine_opens_no_slot(machine, package):
    engine = load_engine(package)
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.open_slot()


# Loading: everything is checked before TensorRT sees a byte


def refused(machine, package, reason: str, options: Options | None = None) -> None:
    with pytest.raises(EngineError, match=reason) as caught:
        load_engine(package, options)
    assert machine.trt.deserialised == []
    assert REBUILD in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend_version": "10.7.0"}, r"built by tensorrt 10\.7\.0; here is tensorrt 10\.3\.0"),
        ({"backend_version": "10.3.1"}, r"built by tensorrt 10\.3\.1; here is tensorrt 10\.3\.0"),
        ({"compatibility": {"gpu_name": "NVIDIA A2"}}, r"for NVIDIA A2 .*; this is NVIDIA GeForce RTX 3060"),
        ({"compatibility": {"compute_capability": "8.9"}}, r"compute capability 8\.9.*\(8\.6\)"),
        ({"compatibility": {"l4t": "36.4.3"}}, r"for Jetson Linux 36\.4\.3; this is no Jetson"),
        ({"compatibility": {"multiprocessors": 30}}, r"with 30 multiprocessors; this one has 28"),
        ({"compatibility": {"memory_mib": 6144}}, r"with 6144 MiB of memory; this one has 12288"),
        ({"compatibility": {"cpu_architecture": "aarch64"}}, "on aarch64; this is"),
        (
            {"compatibility": {"version_compatible": True}, "backend_version": "11.4.0"},
            r"by tensorrt 11\.4\.0, newer than the 10\.3\.0 here",
        ),
        ({"compatibility": {"version_compatible": True}}, "carries code that runs on the CPU"),
        ({"plan": b"vtrt a plan of TensorRT-RTX"}, "engine.plan is no tensorrt plan"),
    ],
)
def test_what_was_built_for_something_else_is_refused(machine, tmp_path, changes, reason):
    refused(machine, write_package(tmp_path / "other", **changes), reason)


def test_a_flipped_byte_is_refused(machine, package):
    plan = bytearray(PLAN)
    plan[-1] ^= 1
    (package / "engine.plan").write_bytes(plan)
    refused(machine, package, "was damaged or changed")


def test_a_missing_plan_is_refused(machine, package):
    (package / "engine.plan").unlink()
    refused(machine, package, r"has no engine\.plan")


def test_a_hardware_compatible_plan_loads_on_another_gpu_from_ampere_on(machine, tmp_path, monkeypatch):
    other = {"gpu_name": "NVIDIA A100", "compute_capability": "8.0", "hardware_compatible": True}
    package = write_package(tmp_path / "other", compatibility=other)
    load_engine(package)
    assert len(machine.trt.deserialised) == 1
    turing = recording_cuda.Device("NVIDIA T4", "7.5", False, "12.6", multiprocessors=40, memory=16 << 30)
    machine = Machine(monkeypatch, RecordingCuda(turing))
    refused(machine, package, r"compute capability 8\.0 and later; NVIDIA T4 has 7\.5")


def test_a_plan_that_tensorrt_cannot_read_is_an_error_in_its_words(machine, package):
    machine.trt.unreadable = True
    with pytest.raises(EngineError, match=r"(?s)10\.3\.0 cannot load .*deserializeCudaEngine: as the test"):
        load_engine(package)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("image_size", 8), ("classes", 9), ("profiles", [(1, 4, 4)]), ("profiles", [(2, 4, 8)])],
)
def test_an_engine_with_other_tensors_than_the_manifest_says_is_refused(machine, package, attribute, value):
    setattr(machine.trt, attribute, value)
    with pytest.raises(EngineError, match="are not the manifest's"):
        load_engine(package)


def test_host_code_is_off_unless_asked_for(machine, tmp_path):
    load_engine(write_package(tmp_path / "plain"))
    compatible = write_package(tmp_path / "compatible", compatibility={"version_compatible": True})
    load_engine(compatible, Options(host_code=True))
    assert [host_code for _, host_code, _ in machine.trt.deserialised] == [False, True]


def test_the_dla_core_is_chosen_before_deserialising(machine, tmp_path):
    load_engine(write_package(tmp_path / "dla", compatibility={"dla_core": 1}))
    assert [core for *_, core in machine.trt.deserialised] == [1]


# With the real TensorRT-RTX of this machine


def test_without_a_gpu_the_message_says_so(tmp_path):
    changes = {"backend": "tensorrt-rtx", "backend_version": trt.__version__}
    package = write_package(tmp_path / "rtx", plan=b"vtrt", **changes)
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match=r"no usable NVIDIA GPU: cudaGetDeviceCount.*driver"):
        load_engine(package)


def test_another_version_of_the_real_library_is_refused(tmp_path):
    changes = {"backend": "tensorrt-rtx", "backend_version": "1.2.0.54"}
    package = write_package(tmp_path / "rtx", plan=b"vtrt", **changes)
    with pytest.raises(
        EngineError, match=rf"by tensorrt-rtx 1\.2\.0\.54; here is tensorrt-rtx {trt.__version__}"
    ):
        load_engine(package)


def test_a_tensorrt_plan_under_the_name_of_tensorrt_rtx_is_refused(tmp_path):
    changes = {"backend": "tensorrt-rtx", "backend_version": trt.__version__}
    with pytest.raises(EngineError, match="is no tensorrt-rtx plan"):
        load_engine(write_package(tmp_path / "rtx", plan=b"ftrt", **changes))


def test_the_driver_is_read_from_the_kernel_modules_file(tmp_path):
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
    )
    assert driver_version(version) == "580.95.05"
    assert driver_version(tmp_path / "absent") is None
