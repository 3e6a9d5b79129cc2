"""Widths chosen for a latency against the same share of all channels, at equal latency.

    python -m experiments.budgets glyphs --seeds 3 --minutes 60

For each seed a teacher and a student are trained, and the student is pruned to shares of its own latency:
once with `latency_ms`, once by the least ratio whose network is predicted to take no longer. All that is
finished is reused, so the command can be given again until the table is complete.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from torch import nn

from builder import FittingDevice
from experiments.markdown import table as markdown_table
from models.checkpoint import load_checkpoint
from models.compression import CompressionRun, Role, compress
from models.groups import ChannelGroups
from models.latency import LatencyPredictor, LatencyTable, read_latency_table
from models.preprocessing import Preprocessing
from models.pruning import find_ratio
from models.recipe import Recipe, Settings, make_recipe
from trimrt.options import HELP

_NANOSECONDS: Final = 1e6  # of a millisecond; ratios are found for whole numbers


@click.command(context_settings=HELP)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/budgets"))
@click.option("--seeds", default=3)
@click.option("--fold", default=0)
@click.option(
    "--share", "shares", type=float, multiple=True, default=(0.5, 0.3, 0.15), help="Of the latency."
)
@click.option("--config", type=click.Path(path_type=Path), help="Settings, as of `trimrt compress`.")
@click.option("--minutes", type=float, default=60.0, help="After which nothing else is begun.")
def main(
    source: str,
    out: Path,
    seeds: int,
    fold: int,
    shares: tuple[float, ...],
    config: Path | None,
    minutes: float,
) -> None:
    """Train, prune and compare; print what is finished."""
    deadline, device = time.monotonic() + 60 * minutes, FittingDevice(out / "latency.json")
    rows: list[list[str]] = []
    for seed in range(seeds):
        if time.monotonic() > deadline:
            break
        settings: Settings = {"seed": seed}
        base = _run(source, out / f"seed{seed}", fold, make_recipe(file=config, overrides=settings))
        student, card = load_checkpoint(base.folder / "student")
        if not (out / "latency.json").exists():
            FittingDevice().open_table(student, card.architecture, card.preprocessing, out / "latency.json")
        for share in shares:
            for name, changes in _ways(student, card.preprocessing, share, device):
                if time.monotonic() > deadline:
                    break
                recipe = make_recipe(file=config, overrides=settings | changes)
                folder = out / f"seed{seed}-{share:g}-{name}"
                run = _run(source, folder, fold, recipe, base.folder, device)
                rows.append([str(seed), f"{share:g}", name, *_figures(run, device)])
    headings = [
        "seed",
        "share",
        "widths",
        "predicted ms",
        "measured ms",
        "wrong (validation)",
        "wrong (test)",
    ]
    click.echo(markdown_table(headings, rows))


def _run(
    source: str,
    out: Path,
    fold: int,
    recipe: Recipe,
    reuse: Path | None = None,
    device: FittingDevice | None = None,
) -> CompressionRun:
    until: Role = "student" if reuse is None else "pruned"
    return compress(
        source, out, recipe, fold=fold, until=until, reuse=reuse, device=device, console=Console()
    )


def _ways(
    student: nn.Module, spec: Preprocessing, share: float, device: FittingDevice
) -> Iterator[tuple[str, Settings]]:
    """The settings of both ways to that share of the student's latency."""
    assert device.table_file is not None
    table = read_latency_table(device.table_file)
    most = share * _predicted(student, spec, table)
    yield "chosen", {"latency_ms": most}
    pruning = Recipe().pruning.model_copy(update={"round_to": table.block})
    ratio = find_ratio(
        student,
        spec,
        pruning,
        lambda network: round(_NANOSECONDS * _predicted(network, spec, table)),
        _NANOSECONDS * most,
    )
    yield "uniform", {"pruning": {"ratio": ratio, "round_to": table.block}}


def _predicted(network: nn.Module, spec: Preprocessing, table: LatencyTable) -> float:
    return LatencyPredictor(table).predict(ChannelGroups(network, spec).channels)


def _figures(run: CompressionRun, device: FittingDevice) -> list[str]:
    network, card = load_checkpoint(run.checkpoint)
    assert device.table_file is not None
    table = read_latency_table(device.table_file)
    measured = device.try_out(network, card.preprocessing, table).latency_ms
    validation = round((1 - card.metrics.validation_accuracy) * card.dataset.validation_images)
    return [
        f"{_predicted(network, card.preprocessing, table):.3f}",
        "-" if measured is None else f"{measured:.3f}",
        str(validation),
        str(card.metrics.wrong),
    ]


if __name__ == "__main__":
    main()
