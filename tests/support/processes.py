"""A `trimrt serve` process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from running import wait_until

TRIMRT = str(Path(sys.executable).with_name("trimrt"))


@dataclass
class Started:
    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def said(self, member: str) -> str:
        """The first log line's member of that name."""
        for line in self.log.read_text().splitlines(keepends=True):
            if line.endswith("\n") and member in (entry := json.loads(line)):
                return str(entry[member])
        return ""

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        self.url = self.said("url")
        try:
            return self.url != "" and httpx.get(f"{self.url}/health/ready", verify=False).status_code == 200
        except httpx.ConnectError:
            return False

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextmanager
def start_process(
    options: Sequence[str],
    log: Path,
    *,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> Iterator[Started]:
    """Runs `trimrt serve` on a free port until the block ends; it is ready when the block begins.

    `before` is called in the child before it becomes the server.
    """
    with log.open("w") as stderr:
        command = [TRIMRT, "serve", "--port", "0", *options]
        environment = {**os.environ, **environment}
        process = subprocess.Popen(command, stderr=stderr, env=environment, preexec_fn=before)
    started = Started(process, log)
    try:
        wait_until(started.is_ready, timeout=60)
        yield started
    finally:
        process.kill()
        process.wait()
