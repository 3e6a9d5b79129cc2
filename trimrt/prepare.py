"""`trimrt prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click

from builder import PrepareOptions, make_kit
from builder.compile.targets.base import INT8_REST
from runtime.manifest import Backend, Precision
from trimrt.display import Display
from trimrt.options import FOLDER, HELP, Choice, Command, one_or_more_of, options_of, take


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt prepare digits-resnet18 -o digits-kit",
        "trimrt prepare model.onnx --data photos --preprocess imagenet -o photos-kit",
    ],
)
@click.argument("source", metavar="CHECKPOINT|MODEL")
@click.option(
    "-p",
    "--precision",
    "precisions",
    callback=one_or_more_of(get_args(Precision)),
    metavar="LIST",
    default=",".join(get_args(Precision)),
    help="What can be built from the kit.",
)
@click.option(
    "--target",
    "targets",
    type=Choice(list(INT8_REST)),
    multiple=True,
    default=list(INT8_REST),
    help="What it can be built for; repeatable.",
)
@click.option(
    "-o", "--output", type=FOLDER, required=True, help="The kit's folder; an older kit there is replaced."
)
@options_of(PrepareOptions)
def prepare(
    source: str,
    precisions: Sequence[Precision],
    targets: Sequence[Backend],
    output: Path,
    **preparation: Any,
) -> None:
    """Turn a student into a build kit: everything that compiling on another machine needs.

    A CHECKPOINT is a folder or a name. A MODEL that was not made here is an ONNX file, a file of
    weights (with --architecture, unless it says whose), or torchvision:NAME or timm:NAME with --weights.

    Carry the kit to the device and run `trimrt build KIT` there.
    """
    with Display() as display:
        kit = make_kit(
            source,
            output,
            take(PrepareOptions, preparation),
            precisions=precisions,
            targets=targets,
            observer=display,
        )
        display.note(f"{output}: {', '.join(graph.file for graph in kit.graphs)}")
        display.note(f"Next, on the device:  [bold]trimrt build {output}[/]")
