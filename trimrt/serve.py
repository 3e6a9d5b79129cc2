"""`trimrt serve`: every setting of the server as an option."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, Literal

import click

from server.serve import run
from server.settings import Settings
from trimrt.options import HELP, Choice, Command, shown_default, take


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """An option for every field of `Settings`, which checks the values."""
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
@_with_settings
def serve(**options: Any) -> None:
    """Serve engine packages over HTTP.

    Every option can also be set in the environment, by the name in brackets.
    """
    run(take(Settings, options))
