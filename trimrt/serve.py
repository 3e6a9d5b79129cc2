"""`trimrt serve`: every setting of the server as an option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from server.serve import run
from server.settings import Settings
from trimrt.options import HELP, take


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """An option for every field of `Settings`, which checks the values."""
    for name, field in reversed(Settings.model_fields.items()):
        flag = name.replace("_", "-")
        default = field.get_default(call_default_factory=True)
        switch = field.annotation is bool
        command = click.option(
            f"--{flag}/--no-{flag}" if switch else f"--{flag}",
            name,
            default=None,
            type=bool if switch else str,
            metavar=None if switch else "VALUE",
            help=f"{field.description}"
            + (
                f"  [TRIMRT_{name.upper()}; default: {default}]"
                if str(default or "")
                else f"  [TRIMRT_{name.upper()}]"
            ),
        )(command)
    return command


@click.command(context_settings=HELP)
@_with_settings
def serve(**options: Any) -> None:
    """Serve engine packages over HTTP.

    Every option can also be set in the environment, by the name in brackets. Example:

        trimrt serve --engine digits-resnet18-int8-openvino
    """
    run(take(Settings, options))
