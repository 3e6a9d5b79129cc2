"""A GPU that is gone for good: a real server over a stand-in for CUDA, whose calls fail from then on."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from recorded_machine import SIZE, Machine, write_package
from recording_cuda import RecordingCuda
from running import Running, running

from server.settings import Settings
from trimrt.serve.command import LOST_CODE

NAME = "digits-fp16-tensorrt"


def image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), "green").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    write_package(tmp_path / NAME)
    return Machine(monkeypatch, RecordingCuda())


def settings(folder: Path, **changes: object) -> Settings:
    return Settings(engine=NAME, engine_dir=folder, port=0, slots=1, **changes)  # type: ignore[arg-type]


def health(server: Running) -> tuple[int, str]:
    """The status of readiness, and the metric."""
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith("trimrt_engine_lost{"):
            return server.client.get("/health/ready").status_code, line.split()[-1]
    raise AssertionError("no such metric")


def test_a_lost_gpu_ends_readiness_at_the_first_batch(machine: Machine, tmp_path: Path) -> None:
    with running(settings(tmp_path)) as server:
        assert server.predict(image()).status_code == 200
        assert health(server) == (200, "0.0")
        machine.cuda.lost = True
        assert server.predict(image()).status_code == 500
        assert health(server) == (503, "1.0")
        answer = server.client.get("/health/ready").json()
        assert answer["type"] == "urn:trimrt:problem:not-ready"
        assert "lost its GPU" in answer["detail"]
        assert "cudaErrorIllegalAddress" in answer["detail"]
        assert server.client.get("/v2/health/ready").status_code == 503
        assert server.client.get("/health/live").status_code == 200
        # Whatever CUDA says now: in this process the GPU does not come back.
        machine.cuda.lost = False
        assert health(server) == (503, "1.0")


def test_batches_that_fail_in_a_row_end_readiness_until_one_succeeds(
    machine: Machine, tmp_path: Path
) -> None:
    with running(settings(tmp_path, max_failed_batches=3)) as server:
        machine.cuda.fail["record"] = lambda: True
        statuses = []
        for _ in range(3):
            assert server.predict(image()).status_code == 500
            statuses.append(health(server))
        assert statuses == [(200, "0.0"), (200, "0.0"), (503, "1.0")]
        assert "3 batches in a row" in server.client.get("/health/ready").json()["detail"]
        machine.cuda.fail.clear()
        assert server.predict(image()).status_code == 200
        assert health(server) == (200, "0.0")


def test_an_image_that_cannot_be_decoded_is_no_failure_of_the_engine(
    machine: Machine, tmp_path: Path
) -> None:
    with running(settings(tmp_path, max_failed_batches=1)) as server:
        assert server.predict(b"no image at all").status_code == 400
        assert server.predict(image()[:45]).status_code == 400
        assert health(server) == (200, "0.0")


CHILD = """
import sys, threading, urllib.request
from pathlib import Path
import pytest
from recorded_machine import Machine
from recording_cuda import RecordingCuda
from trimrt.cli import main

folder, image, port = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), sys.argv[3]
machine = Machine(pytest.MonkeyPatch(), RecordingCuda())

def lose():
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(f"{url}/health/ready").close()
            break
        except OSError:
            threading.Event().wait(0.05)
    machine.cuda.lost = True
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/predict", image, {"Content-Type": "image/png"}))
    except OSError:
        pass

threading.Thread(target=lose, daemon=True).start()
main(["serve", "--engine", sys.argv[4], "--engine-dir", str(folder), "--port", port, *sys.argv[5:]])
"""


def test_the_process_ends_by_itself_with_its_own_code_if_told_to(tmp_path: Path) -> None:
    from benchmarks.serving import free_port

    write_package(tmp_path / NAME)
    (tmp_path / "image.png").write_bytes(image())
    arguments = [str(tmp_path), str(tmp_path / "image.png"), str(free_port()), NAME, "--exit-when-lost"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *arguments],
        env={"PYTHONPATH": f"{root}:{root / 'tests/support'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == LOST_CODE, done.stderr
    assert "lost its GPU" in done.stderr
