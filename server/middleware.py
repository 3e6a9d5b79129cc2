"""What surrounds every HTTP request: its id, HEAD, and its line in the access log. Pure ASGI, for speed."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.service import service_of

access_log = logging.getLogger("trimrt.access")

REQUEST_TIMEOUT: Final = 408  # the connection is closed (RFC 9110, 15.5.9)

_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Gives every request an id (the client's `X-Request-Id` where it is sane) and logs how it ended.

    What answers GET answers HEAD too; the server leaves the body out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
                if status == REQUEST_TIMEOUT or service_of(scope["app"]).lifecycle.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        routed = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(routed, receive, send_with_id)
        finally:
            log_access(scope, scope["method"], scope["path"], status, request_id, started)


def log_access(
    scope: Mapping[str, Any],
    method: str,
    path: str,
    status: int,
    request_id: str,
    started: float,
    **more: object,
) -> None:
    """Write a request's line in the access log, if that is on; it began at `started` and ends now."""
    if access_log.isEnabledFor(logging.INFO):
        access_log.info(
            "request",
            extra={
                "request_id": request_id,
                "method": method,
                "path": path,
                "status": status,
                "duration_ms": round((time.monotonic() - started) * 1000, 3),
                "client": (scope["client"] or ("",))[0],
                **more,
            },
        )


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's `X-Request-Id` where it is sane, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _ACCEPTED_ID.fullmatch(value):
            return value.decode()
    # Not `os.urandom`: it gives up the interpreter's lock, and under load waits 0.1 ms to get it back.
    return f"{random.getrandbits(64):016x}"
