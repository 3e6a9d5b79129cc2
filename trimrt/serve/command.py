"""`trimrt serve`: every setting of the server as an option; it runs until a signal ends it."""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
import socket
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import click

from runtime.health import EngineLostError
from server.settings import Settings
from trimrt.options import HELP, Choice, Command, shown_default, take

LOST_CODE: Final = 70  # the exit code when an engine was lost

log = logging.getLogger("trimrt")


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of `Settings`, which checks the values."""
    for name, field in reversed(Settings.model_fields.items()):
        flag = name.replace("_", "-")
        default = shown_default(field)
        switch = field.annotation is bool
        words = _words(field.annotation)
        command = click.option(
            f"--{flag}/--no-{flag}" if switch else f"--{flag}",
            name,
            default=None,
            type=bool if switch else Choice(words) if words else str,
            metavar=None if switch or words else "VALUE",
            help=f"{field.description}  [TRIMRT_{name.upper()}{default and f'; default: {default}'}]",
        )(command)
    return command


def _words(kind: Any) -> tuple[str, ...]:
    """The words that a setting is one of; empty where it is something else."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return options
    return next((words for option in options if (words := _words(option))), ())


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt serve",
        "trimrt serve --engine digits-resnet18-int8-openvino --port 8080",
        "trimrt serve --engine-dir engines --watch --host 0.0.0.0",
    ],
)
@with_settings
def serve(**options: Any) -> None:
    """Serve engine packages over HTTP.

    Every option can also be set in the environment, by the name in brackets.
    """
    _run(take(Settings, options))


class _Lost(click.ClickException):
    exit_code = LOST_CODE


def _ending(error: Exception) -> click.ClickException:
    """The end of the process by `error`."""
    return (_Lost if isinstance(error, EngineLostError) else click.ClickException)(str(error))


def _run(settings: Settings) -> None:
    """Serve until a signal ends it."""
    from server.keeping import make_folder
    from server.registry import resolve_engines
    from trimrt import logs
    from trimrt.serve.listening import listen, listen_locally

    logs.configure(settings.log_level, settings.log_format, access_log=settings.access_log)
    packages = resolve_engines(settings)  # the commonest mistake, told before anything heavy is imported
    if settings.trust.keys:
        log.info("packages must be signed", extra={"by": ", ".join(sorted(settings.trust.keys))})
    import_extras(settings)
    if settings.keep is not None:
        make_folder(settings.keep)
    with ExitStack() as stack:
        listener = stack.enter_context(listen(settings))
        local = None
        if settings.uds is not None:
            local = stack.enter_context(listen_locally(settings.uds))
            log.info("listening", extra={"uds": str(settings.uds)})
        url = f"http://{_place(listener)}"
        if settings.workers > 1:
            _serve_together(settings, [listener, *([local] if local else [])], packages, url)
        else:
            _serve_alone(settings, listener, local, url)


def import_extras(settings: Settings) -> None:
    """Import what `settings` need besides: what is not installed is found out before a port is opened.

    Raises:
        ModuleNotFoundError: of an extra.
    """
    if settings.otlp_endpoint:
        importlib.import_module("server.tracing")
    if settings.grpc_port is not None:
        importlib.import_module("server.v2.grpc")


def _place(bound: socket.socket) -> str:
    address, port = bound.getsockname()[:2]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _serve_alone(settings: Settings, listener: socket.socket, local: socket.socket | None, url: str) -> None:
    from models.images.process import configure_decoders
    from server.app import create_app
    from trimrt.serve.draining import DrainingServer

    configure_decoders()
    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_failure=stop)
    server = DrainingServer(app, settings, local)
    log.info("listening", extra={"url": url})
    server.run(sockets=[listener])
    if failures:
        raise _ending(failures[0])


def _serve_together(
    settings: Settings, listeners: Sequence[socket.socket], packages: Sequence[Path], url: str
) -> None:
    from trimrt.serve.listening import reserve_grpc
    from trimrt.serve.supervisor import Supervisor

    if sys.platform == "win32":
        raise click.ClickException("connections cannot be handed to other processes here: use --workers 1")
    if settings.grpc_port is not None:
        reserved = reserve_grpc(settings)
        settings = settings.model_copy(update={"grpc_port": reserved.getsockname()[1]})
        log.info("listening", extra={"grpc": _place(reserved)})
    log.info("listening", extra={"url": url})
    supervisor = Supervisor(settings, listeners, packages)

    async def run() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
        await supervisor.run()

    try:
        asyncio.run(run())
    except EngineLostError as error:
        raise _ending(error) from error
