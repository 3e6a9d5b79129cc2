"""A real server on loopback, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from server.app import create_app
from server.registry import LoadEngine
from server.service import Service, service_of
from server.settings import Settings
from trimrt.serve.draining import DrainingServer
from trimrt.serve.listening import listen, listen_locally


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    """Looks every millisecond; what a test waits for is a state, never a time."""
    never = threading.Event()
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        never.wait(0.001)


class Running:
    """A running server, and a client of it for every thread that asks."""

    def __init__(self, url: str, app: FastAPI, server: DrainingServer, clients: ExitStack) -> None:
        self.url = url
        self.app = app
        self.server = server
        self._clients = clients
        self._of_thread = threading.local()

    @property
    def service(self) -> Service:
        return service_of(self.app)

    @property
    def client(self) -> httpx.Client:
        # One for each thread: threads that share one now and then close each other's connections.
        if not hasattr(self._of_thread, "client"):
            # Without `verify=False` it reads the certificates of all authorities, which takes 30 ms.
            client = httpx.Client(base_url=self.url, timeout=30, verify=False)
            self._of_thread.client = self._clients.enter_context(client)
        return self._of_thread.client

    def predict(self, image: bytes, content_type: str = "image/png", **options: Any) -> httpx.Response:
        headers = {"Content-Type": content_type, **options.pop("headers", {})}
        return self.client.post("/predict", content=image, headers=headers, **options)


@contextmanager
def running(settings: Settings, load: LoadEngine | None = None, *, until: int = 200) -> Iterator[Running]:
    """Serves `settings` until the block ends; when it begins, the engines are loaded and warm.

    `until` is the status of `/health/ready` that is waited for, where no engine is to be loaded.
    """
    failures: list[Exception] = []
    app = create_app(settings, load=load, on_failure=failures.append)
    with ExitStack() as stack:
        local = stack.enter_context(listen_locally(settings.uds)) if settings.uds else None
        server = DrainingServer(app, settings, local)
        yield from _run(app, server, listen(settings), failures, until)


def _run(
    app: FastAPI, server: DrainingServer, listener: socket.socket, failures: list[Exception], until: int
) -> Iterator[Running]:
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    host, port = listener.getsockname()[:2]
    url = f"http://{host}:{port}"
    try:
        wait_until(lambda: server.started)
        with ExitStack() as clients:
            served = Running(url, app, server, clients)
            wait_until(lambda: bool(failures) or served.client.get("/health/ready").status_code == until)
            if failures:
                raise failures[0]
            yield served
    finally:
        server.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive()
