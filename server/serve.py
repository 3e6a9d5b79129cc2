"""The application on uvicorn, with a drain before it stops."""

from __future__ import annotations

import importlib
import logging
import socket
from typing import Final

import click

from runtime.health import EngineLostError
from runtime.manifest import EngineError
from server.settings import Settings

LOST_CODE: Final = 70  # the exit code when an engine was lost

log = logging.getLogger("trimrt")


class _Lost(click.ClickException):
    exit_code = LOST_CODE


def run(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        click.ClickException: a port is taken, or an engine named in `settings` cannot be served.
        ModuleNotFoundError: tracing or gRPC is asked for and not installed.
    """
    from server import logs
    from server.registry import resolve_engines

    logs.configure(settings.log_level, settings.log_format, access_log=settings.access_log)
    try:
        resolve_engines(settings)  # the commonest mistake, told before anything heavy is imported
    except EngineError as error:
        raise click.ClickException(str(error)) from None
    # What is not installed is found out before a port is opened.
    if settings.otlp_endpoint:
        importlib.import_module("server.tracing")
    if settings.grpc_port is not None:
        importlib.import_module("server.v2.grpc")
    listener = listen(settings)

    from models.images.process import configure_decoders
    from server.app import create_app
    from server.draining import DrainingServer

    configure_decoders()
    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_failure=stop)
    server = DrainingServer(app, settings)
    address, port = listener.getsockname()[:2]
    log.info("listening", extra={"url": f"http://{f'[{address}]' if ':' in address else address}:{port}"})
    server.run(sockets=[listener])
    if failures:
        lost = isinstance(failures[0], EngineLostError)
        raise (_Lost if lost else click.ClickException)(str(failures[0]))


def listen(settings: Settings) -> socket.socket:
    """A socket on the address that `settings` names, not yet listening.

    Raises:
        click.ClickException: it cannot be had.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        # asyncio turns off Nagle's algorithm, which would hold an answer's body back for 40 ms, only where
        # the protocol is named.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise click.ClickException(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
            "choose another with --port"
        ) from None
