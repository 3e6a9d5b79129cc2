"""In front of several pools of replicas: the first that has room answers."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import Any, Final

import anyio
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from server.bodies import BodyMemory, body_too_large
from server.problems import Problem

# Headers that are forwarded to a replica; the rest belong to the connection.
_PASSED_ON: Final = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path"),
    *("headers", "client", "server"),
)
# How long a request waits for one pool before it asks the next; Ray's own question to a replica how busy it
# is takes up to 0.1 s.
_PATIENCE_S: Final = 0.1


class Router:
    """Asks the pools in their order, again and again, until one has room.

    Within a pool Ray chooses the replica. A request whose replica dies is asked again: inference changes
    nothing, so that is safe.

    Args:
        pools: handles of the deployments.
        max_body_bytes: largest request body.
        max_body_memory_bytes: most that all bodies together may hold.
        timeout_s: longest that a body may take to arrive, and a request to find room.
    """

    def __init__(
        self, *pools: DeploymentHandle[Any], max_body_bytes: int, max_body_memory_bytes: int, timeout_s: float
    ) -> None:
        self._pools = [pool.answer for pool in pools]
        self._max_body_bytes = max_body_bytes
        self._memory = BodyMemory(max_body_memory_bytes)
        self._timeout_s = timeout_s

    async def __call__(self, request: Request) -> Response:
        """Answer a request from one of Ray's HTTP proxies."""
        try:
            body = bytearray()
            try:
                await self._read(request, body)
                return await self._ask({key: request.scope.get(key) for key in _PASSED_ON}, bytes(body))
            finally:
                self._memory.release(len(body))
        except Problem as problem:
            return problem.response()

    async def _read(self, request: Request, body: bytearray) -> None:
        """Read the request's body into `body`, which is reserved in the memory."""
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdecimal() else 0
        try:
            with anyio.fail_after(self._timeout_s):
                async for chunk in request.stream():
                    if max(size, len(body) + len(chunk)) > self._max_body_bytes:
                        raise body_too_large(self._max_body_bytes)
                    self._memory.reserve(len(chunk))
                    body += chunk
        except TimeoutError:
            detail = f"the body had not arrived after {self._timeout_s:g} s"
            raise Problem("body-timeout", detail) from None

    async def _ask(self, scope: dict[str, Any], body: bytes) -> Response:
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            refused = 0
            for pool in self._pools:
                try:
                    async with AsyncExitStack() as place:
                        with anyio.fail_after(_PATIENCE_S):
                            replica = await place.enter_async_context(pool.choose_replica())
                        response: Response = await pool.dispatch(replica, scope, body)
                        return response
                except (BackPressureError, DeploymentUnavailableError):
                    refused += 1
                except (TimeoutError, ReplicaUnavailableError, RayActorError):
                    continue
            if refused == len(self._pools):
                raise Problem("queue-full", "the queues of all pools are full", headers={"Retry-After": "1"})
        raise Problem("deadline-exceeded", "no replica had room in time")
