"""uvicorn, with a drain between the signal and the stop."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.connection import Connection
from server.service import service_of
from server.settings import Settings
from trimrt.serve.local import LocalConnection

log = logging.getLogger("trimrt")

_POLL_S = 0.05
# Long enough for busy keep-alive connections to be told `Connection: close` before theirs is closed.
_LEAST_REFUSING_S = 0.25


class DrainingServer(uvicorn.Server):
    """Answers what it accepted before it stops, and exits with 0 when a signal asked for that.

    After the first signal it is not ready, but serves on for `drain_delay_s` (time for load balancers
    to notice); then it refuses new inference until the running requests are answered, at most
    `grace_s`; then it stops. A second signal stops it at once.

    Args:
        app: the application.
        settings: the server's.
        local: a Unix socket to listen on besides, bound.
    """

    def __init__(self, app: FastAPI, settings: Settings, local: socket.socket | None = None) -> None:
        config = uvicorn.Config(
            app,
            loop="auto",  # uvloop where it is installed: everywhere but Windows
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            root_path=settings.root_path,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=max(1, round(settings.grace_s)),
        )
        super().__init__(config)
        self._app = app
        self._settings = settings
        self._local = local
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._local is not None:
            connect = partial(
                LocalConnection,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )
            self.servers.append(
                await self._loop.create_unix_server(connect, sock=self._local, backlog=self.config.backlog)
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `uvicorn.Server`; not recording the signal makes the exit code 0."""
        if self._drain is not None or not self.started:
            self.should_exit = self.force_exit = True
            # uvicorn would report with a traceback that it cut off the application's end.
            logging.getLogger("uvicorn.error").disabled = True
        else:
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        if self._drain is None:
            self._drain = self._loop.create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        service = service_of(self._app)
        lifecycle, telemetry = service.lifecycle, service.telemetry
        log.info("draining", extra={"in_flight": telemetry.in_flight})
        lifecycle.draining = True
        await asyncio.sleep(self._settings.drain_delay_s)
        lifecycle.refusing = True
        refusing_since = time.monotonic()
        await asyncio.sleep(_LEAST_REFUSING_S)
        while telemetry.in_flight and time.monotonic() - refusing_since < self._settings.grace_s:
            await asyncio.sleep(_POLL_S)
        self.should_exit = True
