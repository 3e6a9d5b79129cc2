"""Load generators: a closed loop on Locust, and an open loop with Poisson arrivals.

Importing this lets gevent take over the standard library, so only the load test's own process may.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import gevent
import locust
from gevent.pool import Group
from geventhttpclient import HTTPClient
from locust.env import Environment
from locust.log import setup_logging

from trimrt.loadtest.requests import Body, reason_of

Progress = Callable[[float, int], None]  # share done, requests so far

_OPEN_CONNECTIONS = 1024
_TIMEOUT_S = 60.0
_TICK_S = 0.1


class Recorder:
    """Collects the outcomes of one load, between start and stop.

    Attributes:
        seconds: latencies of the answered requests.
        lags: how late the generator itself sent, seconds.
        errors: how many requests failed, by reason.
        elapsed: from start to stop, seconds.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.lags: list[float] = []
        self.errors: Counter[str] = Counter()
        self.elapsed = 0.0
        self._since = math.inf
        self._until = math.inf

    def start(self) -> None:
        """Count the requests that begin from now on."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Count no more."""
        self._until = time.monotonic()
        self.elapsed = self._until - self._since

    def add(self, began: float, ended: float, error: str | None) -> None:
        """Count one request, if it began and ended in between."""
        if began < self._since or ended > self._until:
            return
        if error is None:
            self.seconds.append(ended - began)
        else:
            self.errors[error] += 1


def closed_loop(
    url: str,
    headers: dict[str, str],
    bodies: Iterator[Body],
    connections: int,
    warmup: float,
    duration: float,
    progress: Progress,
) -> Recorder:
    """Keep `connections` busy: each sends its next request when its last is answered."""
    setup_logging("WARNING")
    recorder = Recorder()
    path = urlsplit(url)

    class Client(locust.FastHttpUser):
        host = f"{path.scheme}://{path.netloc}"
        wait_time = locust.constant(0)
        network_timeout = connection_timeout = _TIMEOUT_S

        @locust.task
        def predict(self) -> None:
            body = next(bodies)
            began = time.monotonic()
            with self.client.post(
                f"{path.path}?{path.query}",
                data=cast("str", body.data),  # sent as it is; the annotation forgets bytes
                headers={**headers, "Content-Type": body.content_type},
                name="predict",
                catch_response=True,
            ) as response:
                ended = time.monotonic()
                status = response.status_code
                error = None if status == 200 else reason_of(status, response.content or b"")
                recorder.add(began, ended, error)
                response.success()

    environment = Environment(user_classes=[Client])
    runner = environment.create_local_runner()
    runner.start(connections, spawn_rate=max(connections, 1))
    _wait(warmup, lambda _: progress(0.0, 0))
    recorder.start()
    _wait(duration, lambda share: progress(share, len(recorder.seconds)))
    recorder.stop()
    runner.quit()
    return recorder


def open_loop(
    url: str,
    headers: dict[str, str],
    bodies: Iterator[Body],
    rate: float,
    warmup: float,
    duration: float,
    progress: Progress,
    *,
    seed: int,
) -> Recorder:
    """Send at random times, `rate` a second on average, whether or not the server keeps up.

    A request's latency counts from the time it was to be sent, so a server that stalls cannot hide
    the requests that would have come meanwhile (coordinated omission; G. Tene, 2013).
    """
    recorder = Recorder()
    path = urlsplit(url)
    client = HTTPClient(
        path.hostname or "localhost",
        path.port or 80,
        concurrency=_OPEN_CONNECTIONS,
        connection_timeout=_TIMEOUT_S,
        network_timeout=_TIMEOUT_S,
    )

    def send(body: Body, due: float) -> None:
        recorder.lags.append(time.monotonic() - due)
        error: str | None = None
        try:
            response = client.post(
                f"{path.path}?{path.query}", body.data, {**headers, "Content-Type": body.content_type}
            )
            content = response.read()
            if response.status_code != 200:
                error = reason_of(response.status_code, bytes(content))
        except Exception as problem:
            error = type(problem).__name__
        recorder.add(due, time.monotonic(), error)

    arrivals = random.Random(seed)
    under_way = Group()

    def arrive(begin: float, seconds: float) -> None:
        due = begin
        while (due := due + arrivals.expovariate(rate)) < begin + seconds:
            gevent.sleep(max(0.0, due - time.monotonic()))
            under_way.spawn(send, next(bodies), due)
            progress((due - begin) / seconds, len(recorder.seconds))

    arrive(time.monotonic(), warmup)
    recorder.lags.clear()
    recorder.start()
    arrive(time.monotonic(), duration)
    under_way.join(timeout=_TIMEOUT_S)
    recorder.stop()
    client.close()
    return recorder


def _wait(seconds: float, tick: Callable[[float], Any]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        tick(1 - left / seconds)
        gevent.sleep(min(_TICK_S, left))
