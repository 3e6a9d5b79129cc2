"""NVIDIA's `perf_analyzer`, with which this field load-tests, against a server of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from processes import start_process
from tiny_engine import write_package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("perf_analyzer"),
        reason="perf_analyzer is not installed (PyPI's perf-analyzer==2.60.0, for glibc 2.38 or newer)",
    ),
]


@pytest.mark.parametrize("memory", ["none", "system"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_measures_an_engine(tmp_path: Path, protocol: str, memory: str) -> None:
    write_package(tmp_path / "engines")
    options = ["--engine-dir", str(tmp_path / "engines"), "--grpc-port", "0", "--client-shared-memory"]
    with start_process([*options, "--log-format", "json"], tmp_path / "log") as server:
        address = server.said("grpc") if protocol == "grpc" else server.url.removeprefix("http://")
        command = ["perf_analyzer", "-m", "tiny", "-u", address, "-i", protocol, "--shared-memory", memory]
        load = [
            "--concurrency-range",
            "1:4:3",
            "--measurement-interval",
            "1000",
            "--stability-percentage",
            "99",
        ]
        done = subprocess.run(
            [*command, *load], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        measured = re.findall(
            r"^Concurrency: (\d+), throughput: ([\d.]+) infer/sec", done.stdout, re.MULTILINE
        )
        assert [int(concurrency) for concurrency, _ in measured] == [1, 4]
        assert all(float(throughput) > 0 for _, throughput in measured)
        requests = httpx.get(f"{server.url}/stats").json()["requests"]
        protocols = {it["protocol"] for it in requests if it["outcome"] == "ok"}
        assert protocols == {"v2-grpc" if protocol == "grpc" else "v2-rest"}
        assert httpx.get(f"{server.url}/v2/systemsharedmemory/status").json() == []
