"""`python -m experiments.own_models`: real networks of other people, by the documented command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Final, get_args

import click
from rich.console import Console

from experiments.own_models.networks import NETWORKS
from experiments.own_models.results import Results, table
from experiments.own_models.trial import Place, try_network
from experiments.results import FOLDER, made_here
from runtime.manifest import Precision
from trimrt.options import FILE, HELP, one_or_more_of

_FOLDER: Final = Path("build/own-models")


@click.command(context_settings=HELP)
@click.option("--network", "names", multiple=True, help="One of them; repeatable.  [default: all]")
@click.option(
    "-p",
    "--precision",
    "precisions",
    callback=one_or_more_of(get_args(Precision)),
    metavar="LIST",
    default="fp32,fp16,int8",
)
@click.option(
    "--out", type=FILE, default=FOLDER / "own-models.json", show_default="experiments/results/own-models.json"
)
def main(names: Sequence[str], precisions: Sequence[Precision], out: Path) -> None:
    """Download packages that ship pretrained classifiers, build each, and compare labels with the original.

    Packages, pictures and engines stay in build/own-models. What --out has of other networks is kept.
    """
    command = shlex.join(["python", "-m", "experiments.own_models"])
    results = Results(**made_here(command), date=date.today(), trials=[])
    known = {}
    if out.exists():
        known = {trial.name: trial for trial in Results.model_validate_json(out.read_text()).trials}
    if unknown := set(names) - {network.name for network in NETWORKS}:
        raise click.UsageError(f"there is no {', '.join(sorted(unknown))}")
    console, place = Console(), Place(_FOLDER)
    for network in NETWORKS:
        if not names or network.name in names:
            known[network.name] = try_network(network, place, precisions)
            console.print_json(known[network.name].model_dump_json())
        results.trials = [known[each.name] for each in NETWORKS if each.name in known]
        results.write(out)
    console.print(table(results), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
