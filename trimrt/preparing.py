"""What `trimrt build` and `trimrt prepare` share: the options of preparing, and preparing by them."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from builder.prepare.import_onnx import NORMALISATIONS
from builder.prepare.int8 import METHODS
from builder.prepare.sensitivity import LayerCost
from models.card import read_card
from models.recipe import Training
from trimrt.display import Display

if TYPE_CHECKING:
    from builder.prepare.preparation import Preparation

HELP: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
QAT: Final = Training(epochs=16, learning_rate=1e-3, weight_decay=0)

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
    """What says how a checkpoint becomes graphs; a build kit has that behind it."""
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
            click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of images."),
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
                help="Less for large networks that took long to train.",
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


@contextmanager
def prepared(source: str, preparation: dict[str, Any], display: Display) -> Iterator[Preparation]:
    """The checkpoint or model that `source` names, exported; its graphs live as long as the context."""
    path, named = Path(source), source.startswith(("torchvision:", "timm:"))
    model_options = [name for name in ("preprocess", "labels", "weights") if preparation[name] is not None]
    if not named and not path.is_file():
        read_card(path)  # says what is wrong before seconds of importing
        if model_options:
            raise click.UsageError(
                f"{source} is a checkpoint, which says itself what --{model_options[0]} would"
            )
    display.report("importing")
    try:
        from builder.prepare.preparation import Settings, open_checkpoint, prepare
        from builder.prepare.sources import Details, open_named, open_onnx
    except ImportError as error:
        raise click.ClickException(
            f"preparing {source} needs what `pip install 'trimrt[compress]'` brings "
            f"({error}). Or run `trimrt prepare` where that is installed, and build from its kit here"
        ) from error
    method = preparation["calibration"]
    settings = Settings(
        calibration_images=preparation["calibration_images"],
        verification_images=preparation["verification_images"],
        methods=METHODS if method == "auto" else (method,),
        seed=preparation["seed"],
        sensitivity=preparation["sensitivity"],
        qat=_qat(preparation) if preparation["qat"] else None,
    )
    display.report(f"reading {source}")
    if named or path.is_file():
        details = Details(**{name: preparation[name] for name in ("data", "preprocess", "labels", "weights")})
        subject = open_named(source, details) if named else open_onnx(path, details)
    else:
        subject = open_checkpoint(path, preparation["data"])
    with tempfile.TemporaryDirectory(prefix="trimrt-") as workspace:
        graphs = prepare(subject, Path(workspace), settings, display.report, display.progress)
        display.note(f"the exported graph's logits differ by {graphs.export_difference:.1e} at most")
        if settings.sensitivity:
            display.note(_ranking(graphs.layer_costs))
        yield graphs


def _qat(preparation: dict[str, Any]) -> Training:
    chosen = {name: preparation[f"qat_{name}"] for name in ("epochs", "learning_rate")}
    return QAT.model_copy(update=chosen)


def _ranking(costs: Sequence[LayerCost]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer")
    table.add_column("logit error if quantised alone", justify="right")
    for cost in costs:
        table.add_row(escape(cost.layer), f"{cost.error:.3%}")
    return table


def is_typed(context: click.Context, name: str) -> bool:
    """Whether the user gave the parameter `name`."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def command_line(context: click.Context, **chosen: str) -> str:
    """The command that does this again, with what was chosen for some parameters."""
    words = ["trimrt", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        value = chosen.get(name, context.params[name])
        if name not in chosen and not is_typed(context, name):
            continue
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for item in value if isinstance(value, tuple) else (value,):
            option = [] if isinstance(parameter, click.Argument) else [max(parameter.opts, key=len)]
            words += [*option, str(item)]
    return shlex.join(words)
