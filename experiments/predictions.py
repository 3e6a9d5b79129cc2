"""Predicted against measured latency, of networks that no prediction is made of.

    python -m experiments.predictions --latency-table 32 runs/resnet18-32.json

Widths are those that the study of budgets chose, which are lopsided, and random ones. None of these networks
is among the table's, neither those that predictions are made of nor those that correct them. Each is pruned,
exported, quantised and compiled like any other, with random weights, and timed as the table's networks were.
"""

from __future__ import annotations

import random
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import click
from pydantic import BaseModel, Field
from rich.console import Console

from builder import FittingDevice
from builder.prepare.for_timing import random_network
from experiments import budget_results
from experiments.markdown import table as markdown_table
from experiments.results import FOLDER, Made, made_here
from models.evaluation import count_macs
from models.groups import ChannelGroups
from models.latency import LatencyPredictor, LatencyTable, read_latency_table
from models.promise import Device
from trimrt.options import FILE, HELP

_ARCHITECTURE: Final = "resnet18"
_CLASSES: Final = 62  # of glyphs
_CHOSEN: Final = 8  # networks, of all that the study of budgets has
_RANDOM: Final = 8
_SHARES: Final = (0.3, 1.0)  # of a group's channels, of the narrowest and the widest of the random networks
_LEAST: Final = 0.3  # share of that, that a group may have


class Network(BaseModel):
    """One network, predicted and measured."""

    widths: dict[str, int]
    chosen: bool = Field(description="for a budget; else the widths are random")
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of the measured time."""
        return self.predicted_ms / self.measured_ms - 1


class Input(BaseModel):
    """All networks of one input size."""

    side: int = Field(description="of the images, pixels")
    device: Device
    timed_networks: int = Field(description="that predictions are made of")
    networks: list[Network]


class Results(Made):
    """All input sizes."""

    inputs: list[Input]


def chosen_widths(rows: Sequence[budget_results.Row]) -> list[dict[str, int]]:
    """Some of the widths that the study chose for budgets, over all that they take."""
    rows = sorted(
        (row for row in rows if row.way in ("magnitude", "taylor")), key=lambda row: row.predicted_ms
    )
    distinct = list({tuple(row.widths.items()): row.widths for row in rows}.values())
    count = min(_CHOSEN, len(distinct))
    return [distinct[(place * (len(distinct) - 1)) // max(1, count - 1)] for place in range(count)]


def random_widths(table: LatencyTable) -> Iterator[dict[str, int]]:
    """Networks of many times, of whose groups each has a share of its own."""
    draw, (low, high) = random.Random(1), _SHARES
    for number in range(_RANDOM):
        most = high + (low - high) * number / (_RANDOM - 1)
        yield {
            group.name: min(
                group.channels,
                table.block * max(1, round(draw.uniform(_LEAST, 1) * most * group.channels / table.block)),
            )
            for group in table.groups
        }


def untimed(table: LatencyTable, networks: Iterable[Mapping[str, int]]) -> Iterator[dict[str, int]]:
    """Those that the table has no time of."""
    known = [timed.widths for timed in table.timed]
    narrowest = {group.name: table.narrowest(group) for group in table.groups}
    for widths in networks:
        if {name: width for name, width in widths.items() if width > narrowest[name]} not in known:
            yield dict(widths)


def measure(side: int, table: LatencyTable, chosen: Sequence[Mapping[str, int]], console: Console) -> Input:
    """Predict and time networks of that input size.

    Raises:
        click.ClickException: the table is of another machine, or of another network.
    """
    predictor, device, networks = LatencyPredictor(table), FittingDevice(), list[Network]()
    origins = [(True, widths) for widths in untimed(table, chosen)]
    origins += [(False, widths) for widths in untimed(table, random_widths(table))]
    for is_chosen, widths in origins:
        network, student = random_network(_ARCHITECTURE, _CLASSES, side, "auto")
        groups = ChannelGroups(network, student.preprocessing)
        if difference := table.difference(groups.channels, count_macs(network, side, side)):
            raise click.ClickException(f"the latency table is of another network: {difference}")
        groups.prune(widths)
        found = device.try_out(network, student.preprocessing, table)
        if found.latency_ms is None:
            raise click.ClickException(f"the latency table is of another machine: {table.machine}")
        networks.append(
            Network(
                widths=widths,
                chosen=is_chosen,
                predicted_ms=round(predictor.predict(widths), 5),
                measured_ms=round(found.latency_ms, 5),
            )
        )
        last = networks[-1]
        console.print(
            f"{side}: {last.predicted_ms:.3f} predicted, {last.measured_ms:.3f} ms ({last.error:+.1%})"
        )
    return Input(
        side=side,
        device=Device.model_validate(table.model_dump(include=set(Device.model_fields))),
        timed_networks=len(table.networks()),
        networks=networks,
    )


def table(results: Results) -> str:
    """Markdown: how far predictions are off, by input size and by where the widths are from."""
    rows = []
    for each in results.inputs:
        for chosen, words in ((True, "chosen for a latency"), (False, "random")):
            networks = [network for network in each.networks if network.chosen == chosen]
            if not networks:
                continue
            times = [network.measured_ms for network in networks]
            errors = [abs(network.error) for network in networks]
            rows.append(
                [
                    f"{each.side}x{each.side}, {words}",
                    str(len(networks)),
                    f"{min(times):.3f} to {max(times):.3f}",
                    f"{100 * median(errors):.1f} %",
                    f"{100 * max(errors):.1f} %",
                ]
            )
    return markdown_table(["widths", "networks", "measured ms", "median error", "largest error"], rows)


@click.command(context_settings=HELP)
@click.option(
    "--latency-table",
    "tables",
    type=(int, FILE),
    multiple=True,
    required=True,
    metavar="SIDE FILE",
    help=f"Input size, and the table of a ResNet18 of {_CLASSES} classes at that size.",
)
@click.option(
    "--out",
    type=FILE,
    default=FOLDER / "predictions.json",
    show_default="experiments/results/predictions.json",
)
def main(tables: tuple[tuple[int, Path], ...], out: Path) -> None:
    """Time networks on this machine, which should have nothing else to do, and compare with predictions."""
    study = budget_results.Results.model_validate_json((FOLDER / "budgets.json").read_text(encoding="utf-8"))
    chosen, console = chosen_widths(study.rows), Console()
    results = Results(
        **made_here(shlex.join(["python", "-m", "experiments.predictions", *sys.argv[1:]])),
        inputs=[measure(side, read_latency_table(file), chosen, console) for side, file in tables],
    )
    results.write(out)
    click.echo(table(results))


if __name__ == "__main__":
    main()
