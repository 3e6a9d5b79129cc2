"""A real Prometheus on loopback, with a configuration of ours, scraping as fast as it can."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from running import wait_until


class Prometheus:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector; an expression that Prometheus cannot parse or compute fails the test."""
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    def get(self, path: str) -> Any:
        return self._client.get(f"/api/v1/{path}").json()["data"]

    def close(self) -> None:
        self._client.close()


@contextmanager
def scraping(target: str, configuration: Path, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with that configuration, except that all it scrapes is `target`, twice a second.

    What a scrape has found is forgotten when the next fails, as on a busy machine: wait for what is queried.
    """
    content = yaml.safe_load(configuration.read_text("utf-8"))
    (job,) = content["scrape_configs"]
    job |= {"static_configs": [{"targets": [target]}], "scrape_interval": "500ms", "scrape_timeout": "500ms"}
    content["rule_files"] = [str(configuration.parent / name) for name in content["rule_files"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(content), "utf-8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*listener.getsockname())
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stderr=log,
            stdout=log,
        )
    prometheus = Prometheus(f"http://{address}")
    try:
        wait_until(lambda: prometheus.is_ready() or process.poll() is not None, timeout=60)
        assert process.poll() is None, (folder / "log").read_text()
        yield prometheus
    finally:
        process.kill()
        process.wait()
        prometheus.close()
