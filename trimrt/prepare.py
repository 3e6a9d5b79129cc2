"""`trimrt prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click

from builder.compile.targets.base import INT8_REST
from builder.kit import KitError, is_kit
from runtime.manifest import Backend, Precision
from trimrt.display import Display
from trimrt.preparing import (
    HELP,
    command_line,
    one_or_more_of,
    preparation_options,
    prepared,
    source_argument,
)


@click.command(context_settings=HELP)
@source_argument("CHECKPOINT|MODEL")
@click.option(
    "-p",
    "--precision",
    "precisions",
    callback=one_or_more_of(get_args(Precision)),
    metavar="LIST",
    default=",".join(get_args(Precision)),
    show_default=True,
    help="What can be built from the kit.",
)
@click.option(
    "--target",
    "targets",
    type=click.Choice(list(INT8_REST)),
    multiple=True,
    default=list(INT8_REST),
    show_default=True,
    help="What it can be built for; repeatable.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The kit's folder; an older kit there is replaced.",
)
@preparation_options
@click.pass_context
def prepare(
    context: click.Context,
    /,
    source: str,
    precisions: Sequence[Precision],
    targets: Sequence[Backend],
    output: Path,
    **preparation: Any,
) -> None:
    """Turn a CHECKPOINT into a build kit: all that compiling on another machine needs.

    A MODEL that was not made here is an ONNX file, or torchvision:NAME or timm:NAME with --weights.

    Carry the kit to the device and run `trimrt build KIT` there.
    """
    with Display() as display:
        if output.exists() and not is_kit(output):
            raise KitError(f"{output} exists and is not a build kit; choose another --output")
        rests = list(dict.fromkeys(INT8_REST[target] for target in targets))
        with prepared(source, preparation, display) as graphs:
            from builder.prepare.preparation import write_kit

            command = command_line(context, precisions=",".join(precisions))
            kit = write_kit(graphs, output, precisions, rests, command)
        display.note(f"{output}: {', '.join(graph.file for graph in kit.graphs)}")
        display.note(f"Next, on the device:  [bold]trimrt build {output}[/]")
