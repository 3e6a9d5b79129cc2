"""TensorRT on a real GPU: `make test-gpu`. The only tests that show that plans run."""

from __future__ import annotations

import importlib.util
import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import running

from builder.compile.verification import engine_logits
from builder.kit import Kit
from runtime.cuda import IMPLEMENTATIONS, open_cuda
from runtime.engine import Engine, Options
from runtime.loading import load_engine
from runtime.manifest import read_manifest
from server.settings import Settings

pytestmark = pytest.mark.gpu

PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, 8, 32)
SOAK_MINUTES = float(os.environ.get("TRIMRT_SOAK_MINUTES", "10"))


@contextmanager
def loaded(package: Path, options: Options | None = None) -> Iterator[Engine]:
    with closing(load_engine(package, options)) as engine:
        yield engine


def reference_logits(engines: dict[str, Path], pixels: np.ndarray) -> np.ndarray:
    with loaded(engines["reference"]) as engine:
        return engine_logits(engine, pixels)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_build_ran_the_engine_and_it_passed_the_gate(engines, precision):
    manifest = read_manifest(engines[precision])
    assert manifest.evidence is not None
    assert manifest.evidence.label_agreement >= 0.98
    assert manifest.compatibility.gpu_name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_agree_with_openvino(engines, kit: Kit, precision):
    pixels = kit.verification.pixels
    with loaded(engines[precision]) as engine:
        labels = engine_logits(engine, pixels).argmax(axis=1)
    agreement = np.mean(labels == reference_logits(engines, pixels).argmax(axis=1))
    assert agreement >= (0.98 if precision == "int8" else 0.99)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_every_batch_gives_its_own_results(engines, kit: Kit, graphs):
    """Sizes in turns, so that a graph replayed with another batch's buffers would be seen."""
    pixels = kit.verification.pixels
    expected = reference_logits(engines, pixels)
    random = np.random.default_rng(0)
    with loaded(engines["fp32"], Options(cuda_graphs=graphs)) as engine, closing(engine.open_slot()) as slot:
        for count in [1, 32, 3, 3, 1, 17, 32, 2, 1, 3, 17, 32] * 3:
            chosen = random.integers(0, len(pixels), count)
            slot.pixels[:count] = pixels[chosen]
            outputs = slot.infer(count)
            np.testing.assert_allclose(outputs.logits, expected[chosen], rtol=0.02, atol=0.05)
            assert set(outputs.timings_ms) == {"h2d", "compute", "d2h"}
            assert all(0 <= milliseconds < 1000 for milliseconds in outputs.timings_ms.values())


def test_slots_on_several_threads_do_not_disturb_each_other(engines, kit: Kit):
    pixels = kit.verification.pixels[:256]
    expected = reference_logits(engines, pixels).argmax(axis=1)
    with loaded(engines["fp16"], Options(slots=4)) as engine:

        def work(seed: int) -> int:
            random, wrong = np.random.default_rng(seed), 0
            with closing(engine.open_slot()) as slot:
                for _ in range(200):
                    count = int(random.integers(1, 33))
                    chosen = random.integers(0, len(pixels), count)
                    slot.pixels[:count] = pixels[chosen]
                    wrong += int((slot.infer(count).logits.argmax(axis=1) != expected[chosen]).sum())
            return wrong

        with ThreadPoolExecutor(4) as threads:
            wrong = sum(threads.map(work, range(4)))
    assert wrong <= 0.01 * 4 * 200 * 16


@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
def test_both_cuda_interfaces_give_the_same(engines, kit: Kit, name):
    package = {"cuda-bindings": "cuda.bindings", "pycuda": "pycuda"}[name]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{name} is not installed")
    pixels = kit.verification.pixels[:64]
    with loaded(engines["fp32"], Options(cuda=name)) as engine:
        logits = engine_logits(engine, pixels)
    np.testing.assert_allclose(logits, reference_logits(engines, pixels), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_serves_over_http(engines, kit: Kit, precision):
    package = engines[precision]
    labels = kit.student.labels
    expected = reference_logits(engines, kit.verification.pixels[:32]).argmax(axis=1)
    settings = Settings(engine=package.name, engine_dir=package.parent, port=0)
    right = 0
    with running(settings) as server:
        for pixels, label in zip(kit.verification.pixels[:32], expected, strict=True):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            response = server.predict(file.getvalue())
            assert response.status_code == 200, response.text
            answer = response.json()
            assert answer["engine"]["precision"] == precision
            right += answer["results"][0]["predictions"][0]["label"] == labels[label]
    assert right >= 31


def test_latency_with_and_without_graphs(engines, capsys):
    """Prints the table of docs/tensorrt.md; asserts only that there is something to print."""
    rows = []
    for precision in PRECISIONS:
        for graphs in (False, True):
            with (
                loaded(engines[precision], Options(cuda_graphs=graphs)) as engine,
                closing(engine.open_slot()) as slot,
            ):
                for batch in BATCHES:
                    for _ in range(20):
                        slot.infer(batch)
                    times = []
                    for _ in range(200):
                        start = time.perf_counter()
                        slot.infer(batch)
                        times.append(1000 * (time.perf_counter() - start))
                    rows.append((precision, "yes" if graphs else "no", batch, float(np.median(times))))
    with capsys.disabled():
        print("\n| precision | CUDA graphs | batch | median ms | images/s |\n|---|---|---|---|---|")
        for precision, graphs_text, batch, median in rows:
            print(f"| {precision} | {graphs_text} | {batch} | {median:.3f} | {1000 * batch / median:,.0f} |")
    assert len(rows) == len(PRECISIONS) * 2 * len(BATCHES)
    assert all(median > 0 for *_, median in rows)


@pytest.mark.timeout(60 * SOAK_MINUTES + 120)
def test_memory_does_not_grow_under_load(engines, kit: Kit):
    """Ten minutes (`TRIMRT_SOAK_MINUTES`) of changing batches, with slots opened and closed meanwhile."""
    pixels = kit.verification.pixels
    random = np.random.default_rng(0)
    cuda = open_cuda()
    cuda.attach_thread()
    try:
        with loaded(engines["int8"]) as engine:

            def turn() -> None:
                with closing(engine.open_slot()) as slot:
                    for _ in range(500):
                        count = int(random.integers(1, 33))
                        slot.pixels[:count] = pixels[:count]
                        slot.infer(count)

            def used() -> tuple[int, int]:
                free, total = cuda.memory()
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                return total - free, resident

            for _ in range(5):
                turn()
            device_before, host_before = used()
            end = time.monotonic() + 60 * SOAK_MINUTES
            while time.monotonic() < end:
                turn()
            device_after, host_after = used()
    finally:
        cuda.detach_thread()
    assert device_after - device_before < 16 << 20
    assert host_after < 1.05 * host_before + (8 << 20)
