"""Several real worker processes under a supervisor in a thread of the test's process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from running import wait_until
from tiny_engine import LABELS

from server.registry import resolve_engines
from server.settings import Settings
from trimrt.serve.listening import listen
from trimrt.serve.supervisor import Supervisor

OK = 'trimrt_requests_total{outcome="ok",protocol="predict",reason=""}'


@dataclass
class Together:
    url: str
    supervisor: Supervisor
    loop: asyncio.AbstractEventLoop
    failures: list[BaseException] = field(default_factory=list)

    @property
    def pids(self) -> list[int]:
        """Processes of the workers that can serve."""
        return [member.pid for member in list(self.supervisor.members) if member.is_loaded]

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request over a connection of its own, so that workers take turns."""
        return httpx.request(method, f"{self.url}{path}", verify=False, timeout=30, **options)

    def predict(self, image: bytes, **options: Any) -> httpx.Response:
        return self.ask("POST", "/predict", content=image, headers={"Content-Type": "image/png"}, **options)

    def ask_each(self, path: str) -> list[Any]:
        """What each worker says: as many connections, open at the same time."""
        with (
            httpx.Client(base_url=self.url, verify=False) as one,
            httpx.Client(base_url=self.url, verify=False) as two,
        ):
            return [client.get(path).json() for client in (one, two)]

    def samples(self) -> dict[str, float]:
        """`/metrics`, by a series' name and labels."""
        lines = [line for line in self.ask("GET", "/metrics").text.splitlines() if not line.startswith("#")]
        return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}

    @property
    def owner(self) -> int:
        """Process of the owner of engines; 0: there is none that can run them."""
        owner = self.supervisor.owner
        return owner.pid if owner is not None and owner.is_loaded else 0

    def unconnected(self) -> int:
        """The worker without a connection, where one client has the only one."""
        members = self.supervisor.members
        wait_until(lambda: sorted(member.taker.open for member in members) == [0, 1])
        (other,) = [member.pid for member in members if member.taker.open == 0]
        return other

    def kill_one(self) -> int:
        """Kill a worker as `kill -9` does; its process."""
        os.kill(killed := self.pids[0], signal.SIGKILL)
        return killed

    def wait_until_replaced(self, killed: int) -> None:
        wait_until(lambda: killed not in self.pids and len(self.pids) == 2)

    def wait_until_owner_replaced(self, killed: int) -> None:
        wait_until(lambda: self.owner not in (0, killed))


@contextmanager
def together(settings: Settings) -> Iterator[Together]:
    """Serves `settings` with two workers until the block ends; ready when it begins."""
    settings = settings.model_copy(update={"workers": 2})
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    supervisor = Supervisor(settings, [listener], resolve_engines(settings))
    loop = asyncio.new_event_loop()
    it = Together(f"http://{host}:{port}", supervisor, loop)

    def run() -> None:
        try:
            loop.run_until_complete(supervisor.run())
        except BaseException as error:
            it.failures.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: bool(it.failures) or len(it.pids) == 2, timeout=60)
        if it.failures:
            raise it.failures[0]
        wait_until(lambda: it.ask("GET", "/health/ready").status_code == 200)
        yield it
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(supervisor.stop)
        thread.join(timeout=30)
    assert not thread.is_alive()


@contextmanager
def load(
    served: Together, images: Sequence[bytes], clients: int = 8
) -> Iterator[list[httpx.Response | httpx.TransportError]]:
    """Clients that keep their connections and ask for one image after the other, while the block runs."""
    outcomes: list[httpx.Response | httpx.TransportError] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=served.url, verify=False, timeout=30) as client:
            while not stop.is_set():
                try:
                    outcomes.append(client.post("/predict", content=images[number % len(images)]))
                except httpx.TransportError as error:
                    outcomes.append(error)

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, number) for number in range(clients)]
        try:
            wait_until(lambda: len(outcomes) > 2 * clients)
            yield outcomes
            seen = len(outcomes)
            wait_until(lambda: len(outcomes) > seen + 2 * clients)
        finally:
            stop.set()
        for client in asking:
            client.result()


def is_right(response: httpx.Response, expected: dict[str, np.ndarray]) -> bool:
    """Whether an answer is what the engine says that it names."""
    said = response.json()["results"][0]["predictions"][0]
    probabilities = expected[response.json()["engine"]["name"]]
    return said["label"] == LABELS[int(probabilities.argmax())] and np.isclose(
        said["probability"], probabilities.max(), atol=1e-4
    )


def states(served: Together, name: str) -> set[str]:
    return {
        row["state"] for said in served.ask_each("/engines") for row in said["engines"] if row["name"] == name
    }


def is_running(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
