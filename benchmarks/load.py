"""Load on an HTTP server, by `wrk`: every connection posts one photograph after the other."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click
from pydantic import BaseModel

_SCRIPT: Final = Path(__file__).with_name("wrk.lua")
_TIMEOUT_SECONDS: Final = 20  # of one request


class Load(BaseModel):
    """What `wrk` saw; latencies in milliseconds."""

    requests: int
    seconds: float
    failed: int
    refused: int
    p50: float
    p90: float
    p99: float
    longest: float

    @property
    def throughput(self) -> float:
        """Answered requests a second."""
        return (self.requests - self.refused) / self.seconds


def run_wrk(
    url: str, files: Sequence[Path], *, connections: int, seconds: float, headers: Mapping[str, str]
) -> Load:
    """Post `files` in turn to `url` over so many connections, for so many seconds.

    Raises:
        click.ClickException: `wrk` is missing or failed.
    """
    program = shutil.which("wrk")
    if program is None:
        raise click.ClickException("wrk is not installed; on Debian: apt-get install wrk")
    command = [program, "-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s"]
    command += ["--timeout", f"{_TIMEOUT_SECONDS}s", "-s", str(_SCRIPT)]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    result = subprocess.run(
        [*command, url, "--", *map(str, files)], capture_output=True, text=True, check=False
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        raise click.ClickException(f"wrk failed: {result.stderr.strip() or result.stdout.strip()}")
    return Load.model_validate_json(lines[-1])
