"""What Unix socket and shared memory gain a program here: `python -m benchmarks.local_clients PACKAGE`.

One client asks `trimrt serve` for one image after the other, in turns over the port and over the socket, and
by `/v2` with the image in the request and in shared memory. So a machine whose speed drifts is the same for
all. It writes requests that are made before and reads answers without parsing more than their length: what is
compared is the way, not the client.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Final

import click
import numpy as np
import psutil
from PIL import Image
from pydantic import BaseModel, Field
from rich.console import Console

from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD
from benchmarks.measurements import Machine, this_machine
from benchmarks.photos import photographs, store
from benchmarks.processes import exit_on_sigterm, running
from benchmarks.report import markdown_table, write_report
from benchmarks.serving import free_port
from runtime.manifest import Manifest, read_manifest
from trimrt.options import COUNT, HELP, Existing

TCP: Final = "TCP"
SOCKET: Final = "Unix socket"
IN_REQUEST: Final = "TCP, `/v2`"
IN_MEMORY: Final = "TCP, `/v2`, image in shared memory"
AGAINST: Final = {TCP: TCP, SOCKET: TCP, IN_REQUEST: IN_REQUEST, IN_MEMORY: IN_REQUEST}
"""Each way, and the one that it is held against."""

TRIMRT: Final = Path(sys.executable).parent / "trimrt"
_START_S: Final = 60.0
_LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class Turn(BaseModel):
    """One turn of one way."""

    image: str
    way: str
    requests: int
    seconds: float
    p10_ms: float = Field(description="which what else runs on the machine disturbs least")
    p50_ms: float
    p99_ms: float
    cpu_ms: float = Field(description="processor time of the server for one request")

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


class Results(BaseModel):
    """One run of this benchmark."""

    machine: Machine
    engine: str
    seconds: float = Field(description="of each turn")
    turns: list[Turn] = []


class Client:
    """One connection, kept alive."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def ask(self, request: bytes) -> bytes:
        """Send a request; the whole answer.

        Raises:
            click.ClickException: it is no 200.
        """
        self._connection.sendall(request)
        answer = self._connection.recv(1 << 16)
        found = _LENGTH.search(answer)
        if not answer.startswith(b"HTTP/1.1 200 ") or found is None:
            raise click.ClickException(f"the server answered {answer.decode(errors='replace')}")
        missing = answer.index(b"\r\n\r\n") + 4 + int(found[1]) - len(answer)
        while missing > 0:
            more = self._connection.recv(missing)
            missing -= len(more)
            answer += more
        return answer


def take_turn(client: Client, server: psutil.Process, image: str, way: str, request: bytes, s: float) -> Turn:
    """Ask for `s` seconds, one request after the other."""
    taken: list[float] = []
    before = sum(server.cpu_times()[:2])
    began = ended = time.perf_counter()
    while ended < began + s:
        start = ended
        client.ask(request)
        ended = time.perf_counter()
        taken.append(ended - start)
    cpu = sum(server.cpu_times()[:2]) - before
    percentiles = 1000 * np.percentile(taken, [10, 50, 99])
    return Turn(
        image=image,
        way=way,
        requests=len(taken),
        seconds=ended - began,
        p10_ms=percentiles[0],
        p50_ms=percentiles[1],
        p99_ms=percentiles[2],
        cpu_ms=1000 * cpu / len(taken),
    )


def images(folder: Path) -> Mapping[str, bytes]:
    """A small image and a photograph."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    small = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(small, "PNG")
    photograph = store("640x427", photographs(), folder)[0].read_bytes()
    return {
        f"{name}, {len(body) / 1000:.1f} kB": body
        for name, body in (("PNG, 32x32", small.getvalue()), ("JPEG, 640x427", photograph))
    }


def _post(path: str, body: bytes, **headers: str) -> bytes:
    lines = {"Host": "localhost", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@contextmanager
def requests_for(image: bytes, manifest: Manifest, client: Client) -> Iterator[Mapping[str, bytes]]:
    """Whole requests for `image`, by way; what lies in shared memory is registered by `client`."""
    with ExitStack() as stack:
        element = struct.pack("<I", len(image)) + image  # as Triton lays down an element of BYTES
        memory = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="trimrt-"))
        memory.write(element)
        memory.flush()
        name = Path(memory.name).name
        region = f"/v2/systemsharedmemory/region/{name}"
        size = {"key": name, "offset": 0, "byte_size": len(element)}
        client.ask(_post(f"{region}/register", json.dumps(size).encode()))
        stack.callback(client.ask, _post(f"{region}/unregister", b""))

        def infer(**where: object) -> bytes:
            tensor = {"name": manifest.input.name, "shape": [1], "datatype": "BYTES", "parameters": where}
            return json.dumps({"inputs": [tensor]}).encode()

        path, octets = f"/v2/models/{manifest.name}/infer", "application/octet-stream"
        head = infer(binary_data_size=len(element))
        placed = infer(shared_memory_region=name, shared_memory_byte_size=len(element))
        file = _post("/predict", image, Content_Type=octets)
        lengths = {"Inference_Header_Content_Length": str(len(head))}
        yield {
            TCP: file,
            SOCKET: file,
            IN_REQUEST: _post(path, head + element, Content_Type=octets, **lengths),
            IN_MEMORY: _post(path, placed, Content_Type="application/json"),
        }


@contextmanager
def served(package: Path, log: Path) -> Iterator[tuple[psutil.Process, Mapping[str, Client]]]:
    """The server's process, and a client for each way."""
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "trimrt.sock"
        port = free_port()
        command = [str(TRIMRT), "serve", "--engine", str(package), "--port", str(port), "--uds", str(path)]
        command += ["--client-shared-memory"]
        tree = stack.enter_context(running(command, os.environ, log))
        deadline = time.monotonic() + _START_S
        while not _ready(port):
            if tree.ended() or time.monotonic() > deadline:
                raise click.ClickException(f"trimrt serve does not start; see {log}")
            time.sleep(0.1)
        over_tcp = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        over_tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        over_socket = stack.enter_context(socket.socket(socket.AF_UNIX))
        over_socket.connect(str(path))
        tcp = Client(over_tcp)
        yield tree.members()[0], {**dict.fromkeys(AGAINST, tcp), SOCKET: Client(over_socket)}


def _ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            Client(connection).ask(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
    except (OSError, click.ClickException):
        return False
    return True


def markdown(results: Results) -> str:
    """Medians over the turns, and the ratio of each pair of turns."""
    head = [
        "image",
        "over",
        "requests/s",
        "p10 ms",
        "p50 ms",
        "p99 ms",
        "server's CPU ms",
        "requests/s, of those of the same request over TCP",
    ]
    rows = []
    for image in dict.fromkeys(turn.image for turn in results.turns):
        pairs = {way: [it for it in results.turns if (it.image, it.way) == (image, way)] for way in AGAINST}
        for way, turns in pairs.items():
            other = AGAINST[way]
            ratios = sorted(turn.rate / it.rate for turn, it in zip(turns, pairs[other], strict=True))
            against = "" if way == other else f"{median(ratios):.2f} [{ratios[0]:.2f} to {ratios[-1]:.2f}]"
            figures = (
                f"{median(turn.rate for turn in turns):,.0f}",
                f"{median(turn.p10_ms for turn in turns):.3f}",
                f"{median(turn.p50_ms for turn in turns):.3f}",
                f"{median(turn.p99_ms for turn in turns):.3f}",
                f"{median(turn.cpu_ms for turn in turns):.3f}",
            )
            rows.append([image, way, *figures, against])
    turns_each = len(results.turns) // max(1, len(rows))
    about = (
        f"{results.machine}; {results.engine}, one client, {turns_each} turns of {results.seconds:g} s each. "
        "Medians; in brackets the range of the pairs."
    )
    return "\n".join([about, "", *markdown_table(head, rows), ""])


@click.command(context_settings=HELP)
@click.argument("package", type=Existing(file_okay=False))
@click.option("--seconds", default=2.0, help="Length of each turn.")
@click.option("--turns", default=10, type=COUNT, help="Turns of each way.")
@output_option("local_clients.json and local_clients.md")
def main(package: Path, seconds: float, turns: int, output: Path) -> None:
    """Measure what a Unix socket and shared memory gain a program on the same machine."""
    exit_on_sigterm()
    BUILD.mkdir(parents=True, exist_ok=True)
    results = Results(machine=this_machine(), engine=package.name, seconds=seconds)
    files, manifest = images(BUILD / "photographs"), read_manifest(package)
    with served(package, BUILD / "local-clients.log") as (server, clients), steps() as progress:
        task = progress.add_task("", total=len(files) * turns * len(clients))
        for image, file in files.items():
            with requests_for(file, manifest, clients[TCP]) as requests:
                for way, request in requests.items():
                    take_turn(clients[way], server, image, "warm-up", request, 1.0)
                for number in range(turns):
                    ways = list(requests.items())
                    for way, request in ways if number % 2 else reversed(ways):
                        progress.update(task, description=f"{image}, {way}", advance=1)
                        turn = take_turn(clients[way], server, image, way, request, seconds)
                        results.turns.append(turn)
    write_report(results, markdown(results), output / "local_clients.json", Console())


if __name__ == "__main__":
    main()
