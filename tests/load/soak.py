"""Good and hostile clients together, for minutes: `make soak SOAK_MINUTES=30`.

Good clients of several protocols check every answer. Hostile ones send what tests/support/hostile_requests.py
has, leave at any moment, hold connections open, and copy an engine package over the one that is served. The
server's memory is limited by a cgroup where this machine lets us. In the end there are the server's resident
memory, file descriptors and threads, and the longest wait for /health/live, over time.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import grpc
import numpy as np
import psutil
from hostile_requests import FORM, HOSTILE, HOSTILE_MESSAGES, form, infer_message, request
from processes import start_process
from serving import encoded
from tiny_engine import write_package

from server.v2 import inference_pb2 as pb

MEMORY = 1 << 30  # bytes, of the server: what deploy/kubernetes gives it
WARM_UP = 0.2  # share of the time
MOST_GROWTH = 1.05  # of resident memory after the warm-up
DELIBERATE = frozenset({503, 504})
GOOD = ("single", "form", "v2", "grpc", "curl", "health")
GOOD_ANSWERS = frozenset({"200", "429", "503", "504"})
INFER = "/inference.GRPCInferenceService/ModelInfer"
STATUSES = {  # what HTTP calls them
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.CANCELLED: "left",
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


@dataclass(frozen=True)
class Sample:
    """The server at one moment.

    Attributes:
        at: seconds since the start.
        resident: MiB.
        files: open descriptors.
        threads: how many.
        stall: longest wait for /health/live since the sample before, seconds.
    """

    at: float
    resident: float
    files: int
    threads: int
    stall: float


@dataclass
class Outcome:
    """What a soak saw.

    Attributes:
        answers: by client and status; "left" and "closed" where there was none.
        wrong: right statuses with wrong labels, in words.
        samples: in the order of time.
        memory_limited: whether a cgroup held the server's memory below `MEMORY`.
        alive: the server still ran in the end.
    """

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    memory_limited: bool = False
    alive: bool = False

    @property
    def failures(self) -> Counter[tuple[str, str]]:
        """Answers of 5xx that are not deliberate."""
        return Counter(
            {
                key: count
                for key, count in self.answers.items()
                if key[1].isdigit() and int(key[1]) >= 500 and int(key[1]) not in DELIBERATE
            }
        )

    @property
    def growth(self) -> float:
        """Resident memory in the last fifth of the time, as a share of that after the warm-up."""
        end = self.samples[-1].at
        first = [s.resident for s in self.samples if WARM_UP * end < s.at <= 2 * WARM_UP * end]
        last = [s.resident for s in self.samples if s.at > (1 - WARM_UP) * end]
        return float(np.median(last) / np.median(first))


class Soak:
    """Clients of one server, until the time is over."""

    def __init__(
        self, url: str, grpc_address: str, process: psutil.Process, package: Path, seconds: float
    ) -> None:
        address = urlsplit(url)
        self._address = (address.hostname or "", address.port or 80)
        self._grpc_address = grpc_address
        self._process = process
        self._package = package
        self._began = time.monotonic()
        self._end = self._began + seconds
        self._lock = threading.Lock()
        self.outcome = Outcome()
        self._images = [encoded(number) for number in range(20)]
        self._labels = [self._label(image) for image in self._images]

    def run(self) -> Outcome:
        """Until the end."""
        clients: list[Callable[[], None]] = [
            *[self._single] * 3,
            *[self._form] * 2,
            self._v2,
            self._grpc,
            self._curl,
            *[self._hostile] * 3,
            self._hostile_grpc,
            self._holder,
            self._copier,
        ]
        threads = [threading.Thread(target=self._until_the_end, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        self._until_the_end(self._watch)
        for thread in threads:
            thread.join()
        self.outcome.alive = self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        return self.outcome

    def _until_the_end(self, client: Callable[[], None]) -> None:
        while time.monotonic() < self._end and self._process.is_running():
            try:
                client()
            except (OSError, http.client.HTTPException) as error:
                self._count(client.__name__.removeprefix("_"), type(error).__name__)

    def _count(self, client: str, status: int | str) -> None:
        with self._lock:
            self.outcome.answers[client, str(status)] += 1

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        try:
            yield connection
        finally:
            connection.close()

    def _label(self, image: bytes) -> int:
        """What the server says of it while nobody else asks."""
        with self._connection() as connection:
            connection.request("POST", "/predict?engine=tiny", image, {"Content-Type": "image/png"})
            answer = json.loads(connection.getresponse().read())
        return int(answer["results"][0]["predictions"][0]["index"])

    # --- good clients -----------------------------------------------------------------------------------

    def _ask(self, client: str, path: str, body: bytes, content_type: str, numbers: list[int]) -> None:
        with self._connection() as connection:
            for _ in range(random.randrange(1, 50)):
                connection.request("POST", path, body, {"Content-Type": content_type})
                response = connection.getresponse()
                content = json.loads(response.read())
                self._count(client, response.status)
                if response.status != 200:
                    return
                if "results" in content:
                    found = [result["predictions"][0]["index"] for result in content["results"]]
                else:
                    logits = content["outputs"][0]
                    found = np.reshape(logits["data"], logits["shape"]).argmax(1).tolist()
                if found != [self._labels[number] for number in numbers]:
                    self.outcome.wrong.append(f"{client}: {numbers} are {found}")
                if time.monotonic() > self._end:
                    return

    def _single(self) -> None:
        number = random.randrange(len(self._images))
        self._ask("single", "/predict?engine=tiny", self._images[number], "image/png", [number])

    def _form(self) -> None:
        numbers = random.choices(range(len(self._images)), k=random.choice([2, 8, 64]))
        body = form([self._images[number] for number in numbers])
        self._ask("form", "/predict?engine=tiny", body, FORM, numbers)

    def _v2(self) -> None:
        number = random.randrange(len(self._images))
        data = [base64.b64encode(self._images[number]).decode()]
        tensor = {"name": "pixels", "datatype": "BYTES", "shape": [1], "data": data}
        body = json.dumps({"inputs": [tensor], "outputs": [{"name": "logits"}]}).encode()
        self._ask("v2", "/v2/models/tiny/infer", body, "application/json", [number])

    def _grpc(self) -> None:
        numbers = random.choices(range(len(self._images)), k=random.choice([1, 1, 8]))
        message = infer_message([self._images[number] for number in numbers])
        with self._infer() as infer:
            for _ in range(random.randrange(1, 50)):
                status, answer = self._call(infer, message)
                self._count("grpc", status)
                if status != 200:
                    return
                logits = np.frombuffer(pb.ModelInferResponse.FromString(answer).raw_output_contents[0], "<f4")
                found = logits.reshape(len(numbers), -1).argmax(1).tolist()
                if found != [self._labels[number] for number in numbers]:
                    self.outcome.wrong.append(f"grpc: {numbers} are {found}")
                if time.monotonic() > self._end:
                    return

    @contextlib.contextmanager
    def _infer(self) -> Iterator[Callable[..., Any]]:
        # Channels share a connection otherwise.
        with grpc.insecure_channel(self._grpc_address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield channel.unary_unary(INFER)

    @staticmethod
    def _call(infer: Callable[..., Any], message: bytes, timeout: float = 60) -> tuple[int | str, bytes]:
        """The status of a call as HTTP has it, and the answer."""
        try:
            return 200, infer(message, timeout=timeout)
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            return STATUSES.get(code, 500), b""

    def _curl(self) -> None:
        """A client with habits of its own; it offers HTTP/2."""
        if shutil.which("curl") is None:
            threading.Event().wait(self._end - time.monotonic())
            return
        number = random.randrange(len(self._images))
        url = "http://{}:{}/predict?engine=tiny".format(*self._address)
        command = ["curl", "-s", "--http2", "-w", "\n%{http_code}", "-F", "file=@-;filename=x.png", url]
        result = subprocess.run(command, input=self._images[number], capture_output=True, check=False)
        content, _, status = result.stdout.rpartition(b"\n")
        self._count("curl", status.decode())
        if status == b"200":
            found = json.loads(content)["results"][0]["predictions"][0]["index"]
            if found != self._labels[number]:
                self.outcome.wrong.append(f"curl: {number} is {found}")

    # --- hostile clients --------------------------------------------------------------------------------

    def _hostile(self) -> None:
        """One hostile request; some clients leave before the answer."""
        name, make = random.choice(list(HOSTILE.items()))
        with socket.create_connection(self._address, timeout=2) as connection:
            try:
                connection.sendall(make(random.choice(self._images)))
                if random.random() < 0.2:
                    self._count(name, "left")
                    return
                answer = connection.recv(1 << 16)
            except TimeoutError:
                self._count(name, "waited")  # half of something is waited for; its client has patience
                return
        self._count(name, answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed")

    def _hostile_grpc(self) -> None:
        """Hostile messages; some with no patience, and some that are no gRPC at all."""
        if random.random() < 0.1:
            host, _, port = self._grpc_address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=2) as connection:
                connection.sendall(random.choice([random.randbytes(300), b"GET / HTTP/1.1\r\n\r\n"]))
            return
        with self._infer() as infer:
            for name, make in random.choices(list(HOSTILE_MESSAGES.items()), k=5):
                timeout = 0.01 if random.random() < 0.2 else 20.0
                self._count(name, self._call(infer, make(random.choice(self._images)), timeout)[0])

    def _holder(self) -> None:
        """Forty connections that send a byte a second, for a while."""
        whole = request("/predict?engine=tiny", self._images[0], "image/png")
        with contextlib.ExitStack() as stack:
            held = [
                stack.enter_context(socket.create_connection(self._address, timeout=5)) for _ in range(40)
            ]
            for position in range(random.randrange(5, 20)):
                for connection in held:
                    with contextlib.suppress(OSError):
                        connection.send(whole[position : position + 1])
                if threading.Event().wait(min(1.0, max(0.0, self._end - time.monotonic()))):
                    return

    def _copier(self) -> None:
        """Copies a package over the one that is served, in place, byte by byte the same."""
        with tempfile.TemporaryDirectory() as name:
            copy = shutil.copytree(self._package, Path(name) / "copy")
            for _ in range(5):
                shutil.copytree(copy, self._package, dirs_exist_ok=True)
                threading.Event().wait(min(0.5, max(0.0, self._end - time.monotonic())))

    # --- the server ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Once a second a sample; in between, /health/live again and again."""
        with self._connection() as connection:
            while time.monotonic() < self._end:
                stall, sampled = 0.0, time.monotonic()
                while time.monotonic() < min(sampled + 1, self._end):
                    asked = time.monotonic()
                    connection.request("GET", "/health/live")
                    response = connection.getresponse()
                    response.read()
                    stall = max(stall, time.monotonic() - asked)
                    self._count("health", response.status)
                    threading.Event().wait(0.01)
                with self._process.oneshot():
                    self.outcome.samples.append(
                        Sample(
                            at=time.monotonic() - self._began,
                            resident=self._process.memory_info().rss / 2**20,
                            files=self._process.num_fds(),
                            threads=self._process.num_threads(),
                            stall=stall,
                        )
                    )


@contextlib.contextmanager
def limited_memory(pid: int, limit: int) -> Iterator[bool]:
    """Hold a process's memory below `limit` bytes, in a cgroup within our own; False where we may not."""
    places = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers not in places:
            continue
        mount, setting = places[controllers]
        parent = Path("/sys/fs/cgroup", mount, own.lstrip("/"))
        group = parent / f"trimrt-soak-{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / setting).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            group.rmdir()
            continue
        yield True
        with contextlib.suppress(OSError):
            (parent / "cgroup.procs").write_text(str(pid))
            group.rmdir()
        return
    yield False


def soak(folder: Path, seconds: float, *, limit: bool) -> Outcome:
    """Start a server on two small engines in `folder`, and let clients at it for so long."""
    package = write_package(folder / "engines", "tiny", seed=0)
    write_package(folder / "engines", "other", seed=1)
    options = ["--engine-dir", str(folder / "engines"), "--engine", "tiny,other", "--timeout-ms", "5000"]
    options += ["--api-key", "right", "--grpc-port", "0"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(start_process(options, folder / "log"))
        limited = stack.enter_context(limited_memory(server.process.pid, MEMORY)) if limit else False
        process = psutil.Process(server.process.pid)
        outcome = Soak(server.url, server.said("grpc"), process, package, seconds).run()
        outcome.memory_limited = limited
    return outcome


def report(outcome: Outcome) -> str:
    """Twenty moments as a table, and the answers."""
    step = max(1, len(outcome.samples) // 20)
    lines = ["     s   MiB  files  threads  longest wait for /health/live, ms"]
    for first in range(0, len(outcome.samples), step):
        some = outcome.samples[first : first + step]
        last, stall = some[-1], 1000 * max(sample.stall for sample in some)
        lines.append(f"{last.at:6.0f}  {last.resident:4.0f}  {last.files:5}  {last.threads:7}  {stall:7.0f}")
    clients = sorted({client for client, _ in outcome.answers})
    for client in clients:
        found = {status: count for (name, status), count in sorted(outcome.answers.items()) if name == client}
        lines.append(f"{client}: " + ", ".join(f"{count} x {status}" for status, count in found.items()))
    lines.append(f"memory {'was' if outcome.memory_limited else 'was not'} limited to {MEMORY >> 20} MiB")
    return "\n".join(lines)


def faults(outcome: Outcome) -> list[str]:
    """What must not be, in words."""
    found = [f"{count} x {status} of {client}" for (client, status), count in outcome.failures.items()]
    found += [
        f"{count} x {status} of the good client {client!r}"
        for (client, status), count in outcome.answers.items()
        if client in GOOD and status not in GOOD_ANSWERS and (client, status) not in outcome.failures
    ]
    found += outcome.wrong[:10]
    if not outcome.alive:
        found.append("the server is gone")
    if not outcome.answers["single", "200"]:
        found.append("no good request was answered")
    return found


@click.command()
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(min=1))
def main(minutes: float) -> None:
    """Soak a server, print what became of it, and fail if anything is wrong."""
    with tempfile.TemporaryDirectory() as name:
        outcome = soak(Path(name), 60 * minutes, limit=True)
    click.echo(report(outcome))
    found = faults(outcome)
    click.echo(f"resident memory after the warm-up: x {outcome.growth:.3f}")
    if outcome.growth > MOST_GROWTH:
        found.append(f"resident memory grew by {outcome.growth - 1:.1%}")
    for fault in found:
        click.echo(f"FAULT: {fault}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
