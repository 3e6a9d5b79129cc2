"""Load on an HTTP server, by `wrk`: every connection posts one photograph after the other."""

from __future__ import annotations

import json
import shutil
import subprocess
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import click
from pydantic import BaseModel, Field

_SCRIPT: Final = Path(__file__).with_name("wrk.lua")
_TIMEOUT_SECONDS: Final = 20  # of one request


class _Requests(BaseModel):
    requests: int
    seconds: float
    failed: int = 0
    refused: int = 0

    @property
    def throughput(self) -> float:
        """Answered requests a second."""
        return (self.requests - self.refused) / self.seconds


class Round(_Requests):
    """What `wrk` saw without a break; the loop without a server says the same of itself."""

    latencies: list[tuple[int, int]] = Field(description="microseconds, and how many requests took them")
    cpu_seconds: float = Field(description="processor time that it took")


class Load(_Requests):
    """One round or several; latencies in milliseconds."""

    p50: float
    p90: float
    p99: float
    longest: float


def merge(rounds: Sequence[Round]) -> Load:
    """All rounds as if they were one; percentiles are of all requests together, and 0 if there are none."""
    counts: Counter[int] = Counter()
    for one in rounds:
        for microseconds, count in one.latencies:
            counts[microseconds] += count
    values = sorted(counts)
    cumulated = list(accumulate(counts[value] for value in values))

    def percentile(percent: int) -> float:
        if not values:
            return 0.0
        rank = -(-percent * cumulated[-1] // 100)  # rounded up
        return values[bisect_left(cumulated, rank)] / 1000

    return Load(
        requests=sum(one.requests for one in rounds),
        seconds=sum(one.seconds for one in rounds),
        failed=sum(one.failed for one in rounds),
        refused=sum(one.refused for one in rounds),
        p50=percentile(50),
        p90=percentile(90),
        p99=percentile(99),
        longest=percentile(100),
    )


def cpu_milliseconds(rounds: Sequence[Round]) -> float:
    """Processor time for one request."""
    return 1000 * sum(one.cpu_seconds for one in rounds) / max(1, sum(one.requests for one in rounds))


def run_wrk(
    url: str,
    files: Sequence[Path],
    *,
    connections: int,
    seconds: float,
    headers: Mapping[str, str],
    paths: Sequence[str] = (),
    cpu_seconds: Callable[[], float] = lambda: 0.0,
) -> Round:
    """Post `files` in turn to `url` over so many connections, for so many seconds.

    Args:
        url: where to.
        files: what.
        connections: each waits for its answer before it posts again.
        seconds: rounded to whole ones, at least one.
        headers: of every request.
        paths: post each file to all of these in turn, instead of the path of `url`.
        cpu_seconds: processor time of the server so far; asked before the load and as soon as it is over.

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
    posts = [f"{file} {path}" for file in files for path in paths] or list(map(str, files))
    before = cpu_seconds()
    with subprocess.Popen(
        [*command, url, "--", *posts], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            if line.startswith("{"):
                used = cpu_seconds() - before
                result = json.loads(line)
                result["latencies"] = json.loads(process.stdout.readline() or "[]")
                break
            said.append(line)
        else:
            result = None
        process.stdout.read()
    if process.returncode or result is None:
        raise click.ClickException(f"wrk failed: {''.join(said).strip()}")
    return Round(**result, cpu_seconds=used)
