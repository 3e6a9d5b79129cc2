"""The OpenVINO runtime: what it refuses before it looks at a blob, and what it computes."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import openvino
import pytest
from onnx import numpy_helper
from tiny_engine import write_graph, write_package

import runtime.openvino
from runtime.engine import BRIEF_S, Engine, Options, Outputs
from runtime.loading import load_engine
from runtime.manifest import MANIFEST_NAME, EngineError, Manifest, read_manifest
from runtime.openvino import OpenVINOEngine, OpenVINOSlot
from runtime.threads import start_in_engine_thread

Change = Callable[[Manifest], dict[str, Any]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("engines"), max_batch=8)


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """A package to damage."""
    return Path(shutil.copytree(package, tmp_path / "engine"))


@pytest.fixture
def no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a blob is handed to OpenVINO."""

    def refuse(*_: object) -> NoReturn:
        pytest.fail("the blob was deserialised")

    monkeypatch.setattr(openvino.Core, "import_model", refuse)


def rewrite(folder: Path, **changes: Any) -> None:
    manifest = read_manifest(folder).model_copy(update=changes)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())


@pytest.mark.usefixtures("no_import")
def test_blob_of_another_openvino_is_refused(copy: Path) -> None:
    rewrite(copy, backend_version="2024.0.0", build_command="trimrt build runs/x --precision int8")

    with pytest.raises(EngineError) as refusal:
        load_engine(copy)

    built, here, remedy = "2024.0.0", openvino.get_version(), "trimrt build runs/x --precision int8"
    assert all(part in str(refusal.value) for part in (built, here, remedy))


@pytest.mark.usefixtures("no_import")
@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"cpu_architecture": "riscv64"}, "for Linux on riscv64"),
        ({"os": "Windows"}, "for Windows on"),
        ({"cpu_name": "Big CPU", "cpu_features": ["avx2048"]}, "Big CPU with avx2048"),
    ],
)
def test_blob_for_another_processor_is_refused(copy: Path, machine: dict[str, Any], message: str) -> None:
    rewrite(copy, compatibility=read_manifest(copy).compatibility.model_copy(update=machine))
    with pytest.raises(EngineError, match=message):
        load_engine(copy)


@pytest.mark.usefixtures("no_import")
def test_a_preprocessing_for_another_input_is_refused(copy: Path) -> None:
    larger = {"resize": 4096, "height": 4096}
    rewrite(copy, preprocessing=read_manifest(copy).preprocessing.model_copy(update=larger))
    with pytest.raises(EngineError, match=r"takes \[32, 32, 3\], but .* gives \[4096, 32, 3\]"):
        load_engine(copy)


@pytest.mark.usefixtures("no_import")
def test_blob_with_a_flipped_bit_is_refused(copy: Path) -> None:
    blob = bytearray((copy / "engine.blob").read_bytes())
    blob[len(blob) // 2] ^= 1
    (copy / "engine.blob").write_bytes(blob)

    with pytest.raises(EngineError, match="damaged or changed"):
        load_engine(copy)


@pytest.mark.usefixtures("no_import")
def test_package_without_its_blob_is_not_compiled_from_the_graph_beside_it(copy: Path) -> None:
    (copy / "engine.blob").unlink()
    assert (copy / "model.onnx").is_file()

    with pytest.raises(EngineError, match=r"has no engine\.blob; rebuild it"):
        load_engine(copy)


def test_blob_that_openvino_itself_refuses(copy: Path) -> None:
    """Right hash, wrong content: as from a broken build."""
    from runtime.manifest import sha256_of

    (copy / "engine.blob").write_bytes(b"not a blob")
    provenance = read_manifest(copy).provenance.model_copy(
        update={"artefact_sha256": sha256_of(copy / "engine.blob"), "artefact_bytes": 10}
    )
    rewrite(copy, provenance=provenance)
    with pytest.raises(EngineError, match="cannot load"):
        load_engine(copy)


@pytest.fixture(params=["small", "large"])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network counts as small or large, whatever it is."""
    if request.param == "large":
        monkeypatch.setattr(runtime.openvino, "_MEMORY_BYTES", 0)


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("count", [1, 3, 8])
def test_batch_gives_what_its_graph_gives(package: Path, count: int) -> None:
    graph = openvino.Core().compile_model(package / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    slot = load_engine(package).open_slot()
    slot.pixels[:] = np.random.default_rng(count).integers(0, 256, slot.pixels.shape, np.uint8)

    outputs = slot.infer(count)

    logits, probabilities = graph(slot.pixels[:count]).values()
    assert outputs.logits.shape == (count, 10)
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.probabilities, probabilities, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("network")
def test_an_image_gives_the_same_in_every_batch(package: Path) -> None:
    slot = load_engine(package).open_slot()
    slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, np.uint8)
    alone = slot.infer(1).logits.copy()
    for count in (8, 2, 5, 1):
        np.testing.assert_allclose(slot.infer(count).logits[:1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 9, -1])
def test_batch_outside_the_limits_is_refused(package: Path, count: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.8"):
        load_engine(package).open_slot().infer(count)


@pytest.mark.usefixtures("network")
def test_a_slot_is_opened_warm(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has run once in every way that a batch may run; then only an image alone is timed."""
    ran: list[tuple[int, bool]] = []
    infer = OpenVINOSlot.infer

    def record(slot: OpenVINOSlot, count: int, *, alone: bool = False) -> Outputs:
        ran.append((count, alone))
        return infer(slot, count, alone=alone)

    monkeypatch.setattr(OpenVINOSlot, "infer", record)
    load_engine(package, Options(slots=2)).open_slot()
    assert ran[:5] == [(1, True), (1, False), (2, False), (4, False), (8, False)]
    assert set(ran[5:]) == {(1, False)}


def test_an_engine_that_is_not_brief_is_timed_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(package, Options(slots=1, threads=1))
    ran: list[int] = []
    infer = OpenVINOSlot.infer

    def record(slot: OpenVINOSlot, count: int, *, alone: bool = False) -> Outputs:
        ran.append(count)
        return infer(slot, count, alone=alone)

    monkeypatch.setattr(OpenVINOSlot, "infer", record)
    monkeypatch.setattr("runtime.openvino.BRIEF_S", 0.0)
    engine.open_slot()
    assert ran == [1, 1, 2, 4, 8, 1]
    assert engine.alone_s > 0


def test_slots_run_at_once_without_mixing_their_images(package: Path) -> None:
    engine = load_engine(package, Options(slots=2, threads=2))
    expected, got = {}, {}
    start = threading.Barrier(2)

    def run(seed: int) -> None:
        slot = engine.open_slot()
        slot.pixels[:] = np.random.default_rng(seed).integers(0, 256, slot.pixels.shape, np.uint8)
        expected[seed] = slot.infer(4).logits.copy()
        start.wait()
        got[seed] = [slot.infer(4).logits.copy() for _ in range(50)]

    for thread in [start_in_engine_thread(partial(run, seed)) for seed in range(2)]:
        thread.result()

    assert engine.slots == 2
    for seed in range(2):
        assert all(np.allclose(logits, expected[seed], atol=1e-5) for logits in got[seed])
    assert not np.allclose(expected[0], expected[1], atol=1e-3)


def test_what_an_image_alone_takes_is_known_by_the_first_slot(package: Path) -> None:
    engine = load_engine(package, Options(slots=1, threads=1))
    assert engine.alone_s == math.inf
    engine.open_slot().close()
    assert engine.alone_s <= BRIEF_S


def test_streams_and_threads_are_what_was_asked_for(package: Path) -> None:
    engine = load_engine(package, Options(slots=2, threads=2))
    assert isinstance(engine, OpenVINOEngine)
    own, wide = engine._load(threads=1, pinning=False), engine._wide
    assert wide is not None
    for model, threads in ((own, 1), (wide, 2)):
        assert model.get_property("NUM_STREAMS") == 1
        assert model.get_property("INFERENCE_NUM_THREADS") == threads


def test_a_large_network_has_fewer_models(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def models(engine: Engine) -> int:
        assert isinstance(engine, OpenVINOEngine)
        assert engine.run_sizes == [1, 2, 4, 8]
        assert engine.best_batch == 8
        return len(engine._models)

    assert models(load_engine(package)) == 4
    monkeypatch.setattr(runtime.openvino, "_MEMORY_BYTES", 0)
    assert models(load_engine(package)) == 2


def test_many_cores_are_shared_among_few_slots(package: Path) -> None:
    assert load_engine(package, Options(threads=3)).slots == 3
    assert load_engine(package, Options(threads=64)).slots == 8
    assert load_engine(package, Options(threads=64, slots=64)).slots == 64


def test_nothing_is_computed_in_bf16(package: Path) -> None:
    """OpenVINO would choose it by itself where the processor has it."""
    model = load_engine(package, Options(slots=2))._wide  # type: ignore[attr-defined]
    assert model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_an_engine_that_is_loaded_needs_its_files_no_more(copy: Path) -> None:
    engine = load_engine(copy, Options(slots=2))
    slot = engine.open_slot()
    slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, np.uint8)
    before = slot.infer(4).logits.copy()

    blob = copy / "engine.blob"
    with blob.open("r+b") as file:
        file.write(bytes(blob.stat().st_size))

    another = engine.open_slot()
    another.pixels[:] = slot.pixels
    for each in (slot, another):
        np.testing.assert_array_equal(each.infer(4).logits, before)


def test_a_manifest_that_changes_while_it_is_loaded_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_slowly(folder: Path, manifest: Manifest, options: Options) -> OpenVINOEngine:
        engine = OpenVINOEngine(folder, manifest, options)
        rewrite(copy, labels=[f"{label} again" for label in manifest.labels])
        return engine

    monkeypatch.setattr(runtime.openvino, "load", load_slowly)
    with pytest.raises(EngineError, match="changed while it was loaded"):
        load_engine(copy)


def write_graph_without_numbers(path: Path, seed: int) -> None:
    write_graph(path, seed)
    model = onnx.load(path)
    (weights,) = (array for array in model.graph.initializer if array.name == "weights")
    weights.CopyFrom(numpy_helper.from_array(np.full((48, 10), np.nan, np.float32), "weights"))
    onnx.save(model, path)


def test_an_engine_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    engine = load_engine(write_package(tmp_path, write_graph=write_graph_without_numbers))
    with pytest.raises(EngineError, match="NaN or infinite logits"):
        engine.open_slot()


def test_openvinos_converter_of_models_is_not_imported_but_can_be() -> None:
    program = """
import sys, runtime.openvino
assert "openvino.tools.ovc" not in sys.modules
import openvino.tools.ovc
"""
    subprocess.run([sys.executable, "-c", program], check=True)
