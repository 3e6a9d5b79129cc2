"""`trimrt measure-layers`."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Literal

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from builder import LatencyOptions
from builder import measure_layers as measure_table
from builder.compile.targets.base import INT8_REST
from models.latency import LatencyPredictor, LatencyTable
from runtime.manifest import Backend, Precision
from trimrt.display import Display
from trimrt.options import COUNT, HELP, Choice, Command
from trimrt.output import OutputFile


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt measure-layers photos-kit -o orin-nano.json",
        "trimrt measure-layers resnet18 --image-size 224 -o here.json",
    ],
)
@click.argument("source", metavar="KIT|CHECKPOINT|ARCHITECTURE")
@click.option(
    "-o",
    "--output",
    type=OutputFile(),
    required=True,
    help="The latency table's file; an unfinished table there is continued.",
)
@click.option(
    "-p",
    "--precision",
    type=Choice(["fp32", "fp16", "int8"]),
    show_default="int8; of tensorrt-rtx fp16",
    help="Of the engines.",
)
@click.option(
    "--target",
    type=Choice(["auto", *INT8_REST]),
    default="auto",
    help="Compiler; auto is TensorRT where it and a GPU are, else OpenVINO.",
)
@click.option("--batch", type=COUNT, default=1, help="Images in a batch.")
@click.option(
    "--image-size", type=click.IntRange(8, 1024), default=224, help="Of an ARCHITECTURE: side of its input."
)
@click.option("--classes", type=click.IntRange(min=2), default=1000, help="Of an ARCHITECTURE.")
@click.option(
    "--stem",
    type=Choice(["auto", "standard", "small"]),
    default="auto",
    help="Of an ARCHITECTURE: its first convolution; auto is small below 96 pixels.",
)
def measure_layers(
    source: str,
    output: Path,
    precision: Precision | None,
    target: Backend | Literal["auto"],
    batch: int,
    image_size: int,
    classes: int,
    stem: Literal["auto", "standard", "small"],
) -> None:
    """Find out what the layers of a network take on this machine, at every width.

    A KIT needs nothing more on a device. A CHECKPOINT is a folder or a name; an ARCHITECTURE is a name of
    torchvision's, or timm:NAME. Networks of many widths are compiled and timed in turns, and written to a
    latency table, which predicts what a network of any widths takes. Carry it to where networks are pruned.
    """
    options = LatencyOptions(
        precision=precision,
        target=target,
        batch=batch,
        image_size=image_size,
        classes=classes,
        stem=stem,
    )
    with Display() as display:
        table = measure_table(source, output, options, display)
        predictor = LatencyPredictor(table)
        display.note(_summary(table, predictor))
        display.note(
            f"{output}: {len(table.timed)} networks timed, which compute {table.block} channels at a time"
        )
        if errors := sorted(map(abs, predictor.errors)):
            display.note(
                f"{len(errors)} of them are predicted by the others: {median(errors):.1%} off in the median, "
                f"{errors[-1]:.1%} at most"
            )


def _summary(table: LatencyTable, predictor: LatencyPredictor) -> Table:
    """What widening each group alone adds to the narrowest network."""
    least = predictor.predict({})
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, caption=f"all at their narrowest: {least:.3f} ms")
    shown.add_column("channels of", overflow="fold")
    for title in ("layers", "narrowest", "all", "ms more"):
        shown.add_column(title, justify="right", no_wrap=True)
    for group in table.groups:
        more = predictor.predict({group.name: group.channels}) - least
        counts = (len(group.layers), table.narrowest(group), group.channels)
        shown.add_row(escape(group.name), *map(str, counts), f"{more:.3f}")
    return shown
