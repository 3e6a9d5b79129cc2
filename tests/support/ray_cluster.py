"""A real Ray cluster of this machine alone, deployed to as a user does. Imports no Ray until asked for."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from running import wait_until

from benchmarks.serving import free_port
from trimrt.cluster.command import config

PATIENCE = 240  # a process of Ray's takes seconds to start, and much longer on a busy machine
PNG = {"Content-Type": "image/png"}

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": str(PATIENCE),
    "RAY_metrics_report_interval_ms": "500",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    import ray
    from ray import serve

    os.environ.update(_ENVIRONMENT)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # under pytest's own, sockets have too long names
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder))
    try:
        yield Cluster(free_port(), folder)
    finally:
        serve.shutdown()
        ray.shutdown()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()  # Ray does not wait for its processes, which Python tells when it forgets them
        shutil.rmtree(folder, ignore_errors=True)


def configuration(*arguments: object) -> dict[str, Any]:
    """What `trimrt cluster config` writes; it was checked by Ray's own schema."""
    result = CliRunner().invoke(config, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    written: dict[str, Any] = yaml.safe_load(result.stdout)
    return written


class Cluster:
    """Ray on this machine, and the application that was last deployed on it."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._folder = folder

    def submit(self, *arguments: object, **deployment: Any) -> None:
        """As a user does: `trimrt cluster config`, a few changes in the file, `serve run`."""
        from ray.serve.scripts import run

        written = configuration(*arguments, "--port", self._port)
        for each in written["applications"][0]["deployments"]:
            each |= {"health_check_period_s": 0.5, **deployment}
            each["ray_actor_options"]["num_cpus"] = 0.5
            if each["name"] == "router":
                each["num_replicas"] = 1
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(written))
        result = CliRunner().invoke(run, [str(path), "--non-blocking"])
        assert result.exit_code == 0, result.output

    def deploy(self, *arguments: object, **deployment: Any) -> None:
        self.submit(*arguments, **deployment)
        wait_until(lambda: self.status().status in ("RUNNING", "DEPLOY_FAILED"), PATIENCE)
        assert self.status().status == "RUNNING", self.status()

    def status(self) -> Any:
        from ray import serve

        return serve.status().applications["trimrt"]

    def replicas(self, deployment: str = "tiny") -> Counter[str]:
        """How many replicas are in which state."""
        return Counter(self.status().deployments[deployment].replica_states)

    def wait_for_replicas(self, running: int, deployment: str = "tiny") -> None:
        wait_until(lambda: self.replicas(deployment) == {"RUNNING": running}, PATIENCE)


def processes(name: str) -> list[int]:
    """This user's processes whose command begins so."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.stat().st_uid == os.getuid() and (folder / "cmdline").read_bytes().startswith(
                name.encode()
            ):
                found.append(int(folder.name))
        except (OSError, ValueError):  # it has just ended, or is no process
            continue
    return found


def ask(client: httpx.Client, image: bytes) -> tuple[httpx.Response, int]:
    """As docs/scale-out.md tells clients to; also how often it took to ask."""
    for attempt in range(1, 100):
        try:
            response = client.post("/predict", content=image, headers=PNG)
        except httpx.TransportError:
            continue
        problem = response.headers.get("content-type") == "application/problem+json"
        if response.status_code in (429, 503) or (response.status_code == 500 and not problem):
            threading.Event().wait(float(response.headers.get("retry-after", 0.1)))
            continue
        assert response.status_code == 200, response.text
        return response, attempt
    raise AssertionError("no answer")


class Load:
    """Clients that ask one image after the other until they are told to stop.

    Attributes:
        replicas: of each answer, the replica that gave it.
        engines: of each answer, the engine.
        attempts: of each answer, how often it took to ask.
    """

    def __init__(self, url: str, image: bytes, clients: int = 8) -> None:
        self.replicas: list[str] = []
        self.engines: list[str] = []
        self.attempts: list[int] = []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._clients = [self._pool.submit(self._run, url, image) for _ in range(clients)]

    def _run(self, url: str, image: bytes) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not self._stop.is_set():
                response, attempts = ask(client, image)
                self.replicas.append(response.headers["x-replica-id"])
                self.engines.append(response.json()["engine"]["name"])
                self.attempts.append(attempts)

    def wait_for(self, more: int) -> None:
        """Until so many requests more are answered, or a client gave up."""
        enough = len(self.attempts) + more
        wait_until(
            lambda: len(self.attempts) >= enough or any(client.done() for client in self._clients), PATIENCE
        )

    def stop(self) -> None:
        """End the clients, and raise what one of them raised."""
        self._stop.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()
