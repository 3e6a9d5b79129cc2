"""One replica: the whole server, the application that `trimrt serve` runs, on its share of a machine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import cv2
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope

from models.images.process import configure_decoders
from server.app import create_app
from server.problems import Problem
from server.service import service_of
from trimrt import logs
from trimrt.cluster.arguments import on_share
from trimrt.cluster.metrics import ReplicaMetrics


class Replica:
    """What Ray Serve starts, asks, checks, drains and replaces.

    It is up once its engines are warm, and drained by Ray before it ends: Ray sends it nothing more, waits
    for what runs, then destroys it.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
        configured = on_share(settings, cpus)
        logs.configure(configured.log_level, configured.log_format, access_log=configured.access_log)
        self._id = serve.get_replica_context().replica_tag
        self._answered, self._failed = 0, 0
        cv2.setNumThreads(1)  # the process is the replica's own: parallelism is across images
        configure_decoders()
        failures: list[Exception] = []
        self._app = create_app(configured, on_failure=failures.append, observers=[ReplicaMetrics()])
        self._running = AsyncExitStack()
        await self._running.enter_async_context(self._app.router.lifespan_context(self._app))
        await service_of(self._app).loading
        if failures:
            await self._running.aclose()
            raise failures[0]

    async def __call__(self, request: Request) -> Response:
        """Answer a request from one of Ray's HTTP proxies."""
        return await self._respond(request.scope, request.receive)

    async def answer(self, scope: dict[str, Any], body: bytes) -> Response:
        """Answer a request from the router: its ASGI scope, and all of its body."""
        waiting = [body]

        async def receive() -> Message:
            if not waiting:  # a client that goes away cancels this call
                await asyncio.get_running_loop().create_future()
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}

        return await self._respond(scope, receive)

    async def check_health(self) -> None:
        """Let Ray replace this replica when every request since the last check failed in the engine.

        Raises:
            RuntimeError: it is so.
        """
        requests = service_of(self._app).telemetry.requests
        answered = sum(count for key, count in requests.items() if key.outcome == "ok")
        failed = sum(count for key, count in requests.items() if key.reason == "inference-failed")
        was_answered, was_failed = self._answered, self._failed
        self._answered, self._failed = answered, failed
        if failed > was_failed and answered == was_answered:
            raise RuntimeError(f"all of the last {failed - was_failed} requests failed in the engine")

    async def __del__(self) -> None:
        """Called by Ray once what runs is answered: free the engines."""
        if hasattr(self, "_running"):
            await self._running.aclose()

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        refusal = _refusal(scope)
        response = refusal.response() if refusal else await _run(self._app, scope, receive)
        # Ray's proxy adds the request's id, the same one.
        response.raw_headers = [
            *((name, value) for name, value in response.raw_headers if name != b"x-request-id"),
            (b"x-replica-id", self._id.encode()),
        ]
        return response


def _refusal(scope: Mapping[str, Any]) -> Problem | None:
    """What `trimrt serve` offers but one replica of many cannot: the next request meets another one."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if path.startswith("/engines/"):
        return Problem(
            "forbidden", "every replica has engines of its own; change the configuration and deploy it again"
        )
    if path == "/metrics":
        return Problem("not-found", "replicas report through Ray: scrape the metrics of Ray's nodes")
    return None


async def _run(app: ASGIApp, scope: Scope, receive: Receive) -> Response:
    """The application's response, whole."""
    response = Response()
    body = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            response.status_code = message["status"]
            response.raw_headers = list(message["headers"])
        else:
            body.append(message.get("body", b""))

    await app(scope, receive, send)
    response.body = b"".join(body)
    return response
