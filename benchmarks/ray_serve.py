"""What Ray Serve costs, and what a second replica gains: `python -m benchmarks.ray_serve`.

Every server and every replica decodes on one thread and computes on one thread, so that two replicas have
twice what one has. Ray's own processes and `wrk` share the machine with them.
"""

from __future__ import annotations

import http.client
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import click
from pydantic import BaseModel, Field
from rich.console import Console

from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD, TRIMRT, Contender, Form
from benchmarks.engine import FP32, INT8, prepare
from benchmarks.load import Load
from benchmarks.measurements import Machine, this_machine
from benchmarks.photos import photographs, store
from benchmarks.processes import exit_on_sigterm
from benchmarks.report import markdown_table, write_report
from benchmarks.serving import Serving, serving
from trimrt.options import COUNT, HELP

CONNECTIONS: Final = (1, 16)  # latency, and throughput
PROXIES: Final = {False: "Ray's proxy", True: "HAProxy"}

_PROGRAMS: Final = Path(sys.executable).parent
_START_SECONDS: Final = 120


@dataclass(frozen=True)
class Setup(Contender):
    """TrimRT from this environment, bare or on Ray Serve.

    Attributes:
        replicas: how many on Ray Serve; None: `trimrt serve`.
        haproxy: whether HAProxy stands before the replicas, or Ray's own proxy.
    """

    replicas: int | None = None
    haproxy: bool = False

    def command(self, package: Path, port: int) -> list[str]:
        """`trimrt serve`, or what `trimrt cluster config` says, run by Ray."""
        if self.replicas is None:
            one_thread = ["--inference-threads", "1", "--decode-threads", "1"]
            command = [str(_PROGRAMS / "trimrt"), "serve", "--engine", str(package), "--port", str(port)]
            return [*command, *one_thread]
        configuration = BUILD / f"{self.name}.yaml"
        options = ["--replicas", str(self.replicas), "--port", str(port), "--output", str(configuration)]
        subprocess.run(
            [str(_PROGRAMS / "trimrt"), "cluster", "config", str(package), *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return [str(_PROGRAMS / "serve"), "run", str(configuration)]

    def variables(self, form: Form, package: Path, port: int) -> dict[str, str]:
        """A new cluster on this machine, whatever else runs here."""
        return {
            **os.environ,
            "RAY_ADDRESS": "local",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": str(int(self.haproxy)),
        }

    def wait(self, server: Serving) -> None:
        """Return once every replica answers.

        Raises:
            click.ClickException: one did not in two minutes.
        """
        seen: set[str] = set()
        deadline = time.monotonic() + _START_SECONDS
        while len(seen) < (self.replicas or 0):
            if time.monotonic() > deadline:
                raise click.ClickException(f"{self.title}: {len(seen)} of {self.replicas} replicas answer")
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
                connection.request("GET", "/health/live")
                response = connection.getresponse()
                response.read()
                if replica := response.getheader("X-Replica-Id"):
                    seen.add(replica)


def on_ray(replicas: int, haproxy: bool) -> Setup:
    """So many replicas behind one of the two proxies."""
    title = f"Ray Serve, {replicas} replica{'s' if replicas > 1 else ''}, {PROXIES[haproxy]}"
    name = f"ray-{replicas}-{'haproxy' if haproxy else 'proxy'}"
    return Setup(name, title, TRIMRT.path, replicas=replicas, haproxy=haproxy)


BARE: Final = Setup("ray-none", "trimrt serve", TRIMRT.path)
"""No Ray."""
SETUPS: Final = (BARE, *(on_ray(replicas, haproxy) for haproxy in PROXIES for replicas in (1, 2)))
"""The servers that are compared."""


class Point(BaseModel):
    """One load on one server."""

    package: str
    server: str
    round: int
    connections: int
    load: Load
    cpu_ms: float = Field(description="processor time of all its processes for one image")


class Results(BaseModel):
    """One run of this benchmark."""

    machine: Machine
    seconds: float = Field(description="of each load")
    points: list[Point] = []


def markdown(results: Results) -> str:
    """What Ray Serve costs and gains for each engine: medians over the rounds."""
    few, many = CONNECTIONS
    lines = [f"{results.machine}; {results.seconds:g} s a load.", ""]
    for package in dict.fromkeys(point.package for point in results.points):
        rate = _medians(results, package, many, lambda point: point.load.throughput)
        p50 = _medians(results, package, few, lambda point: point.load.p50)
        cpu_ms = _medians(results, package, many, lambda point: point.cpu_ms)
        head = [package, f"images/s, {many} connections", f"p50 ms, {few}", "CPU ms an image"]
        rows = [[name, f"{rate[name]:.1f}", f"{p50[name]:.2f}", f"{cpu_ms[name]:.2f}"] for name in rate]
        lines += [*markdown_table(head, rows), ""]
        none = BARE.title
        for haproxy, proxy in PROXIES.items():
            one, two = (on_ray(replicas, haproxy).title for replicas in (1, 2))
            lines.append(
                f"{proxy}: a second replica gives {rate[two] / rate[one]:.2f}x; a request takes "
                f"{p50[one] - p50[none]:.2f} ms longer than without Ray, and "
                f"{cpu_ms[one] - cpu_ms[none]:.2f} ms more of processor time."
            )
        lines.append("")
    return "\n".join(lines)


def _medians(
    results: Results, package: str, connections: int, figure: Callable[[Point], float]
) -> dict[str, float]:
    """A figure by server."""
    found: dict[str, list[float]] = {}
    for point in results.points:
        if (point.package, point.connections) == (package, connections):
            found.setdefault(point.server, []).append(figure(point))
    return {server: median(figures) for server, figures in found.items()}


@click.command(context_settings=HELP)
@click.option("--seconds", default=10.0, help="Length of each load.")
@click.option("--rounds", default=3, type=COUNT, help="Rounds over all servers.")
@output_option("ray_serve.json and ray_serve.md")
def main(seconds: float, rounds: int, output: Path) -> None:
    """Measure what Ray Serve costs, and what a second replica gains."""
    exit_on_sigterm()
    engines = prepare(BUILD / "engine", click.echo)
    files = store("640x427", photographs(), BUILD / "photographs")
    results = Results(machine=this_machine(), seconds=seconds)
    packages = (INT8, FP32)
    with steps() as progress:
        task = progress.add_task("", total=rounds * len(packages) * len(SETUPS) * len(CONNECTIONS))
        for number in range(rounds):
            for package, setup in itertools.product(packages, SETUPS):
                progress.update(task, description=f"{setup.title}, {package}")
                with serving(setup, "trimrt", engines / package, files[0].read_bytes()) as server:
                    setup.wait(server)
                    server.load(files, max(CONNECTIONS), min(2, seconds))
                    for connections in CONNECTIONS:
                        load, cpu_ms = server.load(files, connections, seconds)
                        results.points.append(
                            Point(
                                package=package,
                                server=setup.title,
                                round=number,
                                connections=connections,
                                load=load,
                                cpu_ms=cpu_ms,
                            )
                        )
                        progress.advance(task)
    write_report(results, markdown(results), output / "ray_serve.json", Console())


if __name__ == "__main__":
    main()
