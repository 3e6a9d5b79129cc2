"""Engines on a device with several workers: one process owns the device. CUDA and TensorRT are stand-ins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import recorded_machine
from processes import start_process
from recorded_machine import CLASSES, SIZE
from recording_cuda import logits_of, probabilities_of
from together import Together, states, together

from models.preprocessing import Preprocessing, load_pixels
from server.settings import Settings
from trimrt.serve.command import LOST_CODE

Encode = Callable[..., bytes]

NAME = "digits-fp16-tensorrt"

# Python runs `sitecustomize` at the start of each process: each has a GPU, and notes that it uses it.
GPU = """
import os
from pathlib import Path

import pytest

import runtime.tensorrt.engine as tensorrt
from recorded_machine import Machine
from recording_cuda import RecordingCuda

here = Path(__file__).parent

class Gpu(RecordingCuda):
    def _called(self, *arguments, **options):
        self.lost = (here / "lost").exists()
        super()._called(*arguments, **options)

machine = Machine(pytest.MonkeyPatch(), Gpu())

def open_cuda(name):
    with (here / "users").open("a") as users:
        users.write(f"{os.getpid()} ")
    return machine.cuda

tensorrt.open_cuda = open_cuda
"""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which each process that opens CUDA writes its number to `users`."""
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(GPU)
    support = Path(recorded_machine.__file__).parent
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(support), known]))
    return folder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    recorded_machine.write_package(tmp_path / "engines" / NAME)
    return tmp_path / "engines"


def users(gpu: Path) -> set[int]:
    return set(map(int, (gpu / "users").read_text().split()))


def check_answers(served: Together, encode: Encode, **options: object) -> None:
    """All workers answer what the stand-in computes."""
    spec = Preprocessing(resize=SIZE, height=SIZE, width=SIZE)
    for seed in range(6):
        probabilities = probabilities_of(logits_of(load_pixels(encode(seed), spec)[None], CLASSES))[0]
        said = served.predict(encode(seed), **options).json()["results"][0]["predictions"][0]
        assert said["label"] == str(np.argmax(probabilities))
        assert said["probability"] == pytest.approx(probabilities.max(), abs=1e-4)


def test_one_process_uses_the_gpu_and_the_workers_answer_with_its_times(
    gpu: Path, directory: Path, encode: Encode
) -> None:
    with together(Settings(engine=NAME, engine_dir=directory, port=0)) as served:
        check_answers(served, encode)
        assert users(gpu) == {served.owner}
        (engine,) = served.ask("GET", "/stats").json()["engines"]
        assert engine["since_start"]["latency_ms"]["compute"]["p50"] > 0
        assert engine["batches"] == 6


def test_the_first_engine_on_a_device_starts_its_owner_beside_workers_that_run_engines_themselves(
    gpu: Path, directory: Path, engine_dir: Path, encode: Encode
) -> None:
    shutil.copytree(engine_dir / "tiny-v1", directory / "tiny-v1")
    with together(Settings(engine="tiny", engine_dir=directory, port=0)) as served:
        assert served.supervisor.owner is None
        assert served.ask("POST", f"/engines/{NAME}/load").status_code == 200
        assert states(served, NAME) == {"loaded"}
        check_answers(served, encode, params={"engine": NAME})
        assert users(gpu) == {served.owner}
        assert {served.predict(encode(0)).json()["engine"]["name"] for _ in range(4)} == {"tiny"}
        assert served.ask("POST", f"/engines/{NAME}/unload").status_code == 200
        assert {served.predict(encode(0), params={"engine": NAME}).status_code for _ in range(4)} == {404}


def test_a_lost_gpu_ends_each_workers_readiness_at_its_first_batch(
    gpu: Path, directory: Path, encode: Encode
) -> None:
    with together(Settings(engine=NAME, engine_dir=directory, port=0)) as served:
        assert {answer["status"] for answer in served.ask_each("/health/ready")} == {"ready"}
        (gpu / "lost").touch()
        assert [served.predict(encode(0)).status_code for _ in served.pids] == [500, 500]
        for answer in served.ask_each("/health/ready"):
            assert answer["status"] == 503
            assert "lost its GPU" in answer["detail"]
        assert served.samples()[f'trimrt_engine_lost{{engine="{NAME}"}}'] == 1


@pytest.mark.slow
def test_a_lost_gpu_ends_all_with_its_own_code_where_that_is_asked_for(
    gpu: Path, directory: Path, tmp_path: Path, encode: Encode
) -> None:
    options = ["--engine-dir", str(directory), "--engine", NAME, "--workers", "2", "--exit-when-lost"]
    with start_process(options, tmp_path / "log") as started:
        (gpu / "lost").touch()
        assert httpx.post(f"{started.url}/predict", content=encode(0)).status_code == 500
        assert started.process.wait(timeout=20) == LOST_CODE
    assert "lost its GPU" in (tmp_path / "log").read_text()
