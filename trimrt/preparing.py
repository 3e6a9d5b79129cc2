"""What the command lines of `trimrt build` and `trimrt prepare` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from builder.options import QAT, PrepareOptions
from builder.prepare.import_onnx import NORMALISATIONS
from builder.prepare.int8 import METHODS

HELP: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_Command = TypeVar("_Command", bound=Callable[..., Any])


def one_or_more_of(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A callback that splits an option's value at its commas; each part must be one of `known`."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        if unknown := [part for part in chosen if part not in known]:
            raise click.BadParameter(f"{', '.join(map(repr, unknown))}: choose from {', '.join(known)}")
        return chosen

    return parse


def source_argument(text: str) -> Callable[[_Command], _Command]:
    """The argument that names what to prepare or build, shown as `text`."""
    return click.argument("source", metavar=text)


def preparation_options(command: _Command) -> _Command:
    """Add the options for how a checkpoint becomes graphs; `take_prepare_options` takes their values."""
    for option in reversed(
        (
            click.option(
                "--data",
                help="Where calibration (training) and validation images come from: digits, fashion-mnist, "
                "or an ImageFolder directory.  [default: what the checkpoint was trained on]",
            ),
            click.option(
                "--calibration",
                type=click.Choice(["auto", *METHODS]),
                default="auto",
                show_default=True,
                help="How INT8 activation ranges are found; auto tries entropy, then max.",
            ),
            click.option("--calibration-images", type=click.IntRange(1), default=512, show_default=True),
            click.option("--verification-images", type=click.IntRange(1), default=1024, show_default=True),
            click.option("--seed", type=int, default=0, show_default=True, help="Selects the images."),
            click.option(
                "--sensitivity",
                is_flag=True,
                help="Rank the layers by what quantising each costs; if INT8 fails the gate, keep the "
                "costliest in higher precision.",
            ),
            click.option(
                "--qat",
                is_flag=True,
                help="If INT8 fails the gate in every other way, fine-tune the network for it "
                "(quantisation-aware training), which takes about as long as training did.",
            ),
            click.option("--qat-epochs", type=click.IntRange(1), default=QAT.epochs, show_default=True),
            click.option(
                "--qat-learning-rate",
                type=click.FloatRange(0, min_open=True),
                default=QAT.learning_rate,
                show_default=True,
                help="Lower for large networks that took long to train.",
            ),
            click.option(
                "--preprocess",
                metavar="NAME|FILE",
                help="How a MODEL's images are normalised: "
                f"{', '.join(NORMALISATIONS)}, or a JSON file with resize, mean and std.",
            ),
            click.option(
                "--labels",
                type=click.Path(dir_okay=False, path_type=Path),
                help="A MODEL's classes, one a line.  [default: the data's]",
            ),
            click.option(
                "--weights",
                metavar="FILE|pretrained",
                help="For torchvision:NAME and timm:NAME: a state dict, or the library's own weights.",
            ),
        )
    ):
        command = option(command)
    return command


def take_prepare_options(values: dict[str, Any]) -> PrepareOptions:
    """What was given on the command line, taken out of `values`."""
    return PrepareOptions(**{field.name: values.pop(field.name) for field in fields(PrepareOptions)})
