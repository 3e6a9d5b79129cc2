"""`trimrt doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

import click
from rich.console import Console
from rich.markup import escape

from server.settings import Settings
from trimrt.doctor.findings import Diagnosis, Finding, State
from trimrt.doctor.machine import look_at_caches, look_at_devices, look_at_machine, look_at_packages
from trimrt.doctor.serving import look_at_engines, look_at_extras, look_at_ports
from trimrt.options import HELP, Command, take
from trimrt.serve.command import with_settings

_MARKS: Final[dict[State, str]] = {
    "ok": "[green]ok[/]  ",
    "note": "[yellow]note[/]",
    "stop": "[red]STOP[/]",
}


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=["trimrt doctor", "trimrt doctor --engine digits-resnet18-int8-openvino --port 8080 --json"],
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for programs.")
@with_settings
def doctor(as_json: bool, **options: Any) -> None:
    """Show what this machine has, and what would keep `trimrt serve` from serving.

    It takes the settings of `trimrt serve`, and loads every engine in turn as the server would. The exit code
    is 0 only if nothing stops the server.
    """
    settings = take(Settings, options)
    console = Console(stderr=as_json, highlight=False)
    diagnosis = Diagnosis()
    for finding in _look(settings):
        diagnosis.findings.append(finding)
        mark, found = _MARKS[finding.state], " ".join(finding.found.split())
        console.print(f"{mark} {escape(f'{finding.subject}: {found}')}", soft_wrap=True)
    if as_json:
        click.echo(diagnosis.model_dump_json(indent=2))
    if not diagnosis.healthy:
        console.print("[red]`trimrt serve` would not serve[/]")
        click.get_current_context().exit(1)
    console.print("[green]`trimrt serve` would serve[/]")


def _look(settings: Settings) -> Iterator[Finding]:
    yield from chain(look_at_machine(), look_at_devices(), look_at_packages(), look_at_caches())
    yield from chain(look_at_extras(settings), look_at_ports(settings), look_at_engines(settings))
