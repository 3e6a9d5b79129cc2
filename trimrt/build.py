"""`trimrt build` and `trimrt prepare`."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args

import click
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from builder.export import ExportError
from builder.import_onnx import NORMALISATIONS
from builder.int8 import METHODS
from builder.kit import GraphSource, Kit, KitError, is_kit, open_kit
from builder.packages import Package, build_package
from builder.publication import PublicationError
from builder.selection import build_best
from builder.sensitivity import LayerCost
from builder.targets import INT8_REST, CompileError, choose_backend, open_target
from builder.tensorrt.flags import build_options, tensorrt_options
from builder.tensorrt.progress import BuildListener, RichListener
from builder.verification import Gate, GateError
from models.card import CheckpointError, read_card
from models.datasets import DatasetError
from models.recipe import Training
from server.manifest import Backend, BatchSizes, EngineError, Precision

if TYPE_CHECKING:
    from builder.preparation import Preparation

QAT: Final = Training(epochs=16, learning_rate=1e-3, weight_decay=0)

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _one_or_more_of(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    def parse(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        if unknown := [part for part in chosen if part not in known]:
            raise click.BadParameter(f"{', '.join(map(repr, unknown))}: choose from {', '.join(known)}")
        return chosen

    return parse


def _source_argument(text: str) -> Callable[[_Command], _Command]:
    return click.argument("source", metavar=text)


def _preparation_options(command: _Command) -> _Command:
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


def _rescues(source: GraphSource, preparation: dict[str, Any]) -> Iterator[str]:
    """What has not been tried to make INT8 pass the gate."""
    tried, of = preparation, ""
    if isinstance(source, Kit):
        made = [graph.calibration for graph in source.manifest.graphs if graph.calibration is not None]
        tried = {
            "sensitivity": any(calibration.higher_precision_layers for calibration in made),
            "qat": any(calibration.method == "qat" for calibration in made),
        }
        of = " (of `trimrt prepare`)"
    if not tried["sensitivity"]:
        yield f"--sensitivity{of} finds the layers that INT8 hurts most, and keeps them out of it"
    if not tried["qat"] and not source.path.is_file():  # a file is a graph, which cannot be trained
        yield f"--qat{of} fine-tunes the network for INT8"


_HELP: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.command(context_settings=_HELP)
@_source_argument("CHECKPOINT|KIT|MODEL")
@click.option(
    "-p",
    "--precision",
    "precisions",
    callback=_one_or_more_of((*get_args(Precision), "best")),
    metavar="LIST",
    default="int8",
    show_default=True,
    help=f"One or more of {', '.join(get_args(Precision))}, separated by commas; or best: the faster one of "
    "fp16 and int8 that passes the gate.",
)
@click.option(
    "--target",
    type=click.Choice(["auto", *INT8_REST]),
    default="auto",
    show_default=True,
    help="What to compile for; auto takes TensorRT where it and a GPU are, else OpenVINO.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("engines"),
    show_default=True,
    help="Folder that the packages' folders go into.",
)
@click.option("--min-batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--opt-batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--max-batch", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    default=0.5,
    show_default=True,
    help="Refuse an engine that loses more top-1 accuracy than this, in points.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 100),
    default=98.0,
    show_default=True,
    help="Refuse an engine that labels fewer validation images as the FP32 network does, in percent.",
)
@tensorrt_options
@_preparation_options
@click.pass_context
def build(
    context: click.Context,
    /,
    source: str,
    precisions: Sequence[Precision | Literal["best"]],
    target: Backend | Literal["auto"],
    output: Path,
    min_batch: int,
    opt_batch: int,
    max_batch: int,
    max_drop: float,
    min_agreement: float,
    **preparation: Any,
) -> None:
    """Compile a student into engine packages, and publish those that are as good as it is.

    From a CHECKPOINT (`trimrt compress`): export, conversion to each precision and compilation. From
    a build KIT (`trimrt prepare`): compilation alone, which needs neither torch nor ModelOpt. A MODEL
    that was not made here is an ONNX file, or torchvision:NAME or timm:NAME with --weights; it needs
    --data.

    Each engine is run over held-out validation images. One that is beyond the accuracy gate is not
    published, and the exit code is not 0.
    """
    batch = _batch_sizes(min_batch, opt_batch, max_batch)
    options = build_options(preparation)
    gate = Gate(max_drop=max_drop / 100, min_agreement=min_agreement / 100)
    packages: list[Package] = []
    refused: list[str] = []
    with _clear_errors(), _Display() as display:
        if target == "auto":
            target, reason = choose_backend()
            display.note(f"target: [bold]{target}[/] ({escape(reason)})")
        compiler = open_target(target, options, display.listener())
        with _open(context, source, preparation, display) as graphs:
            for precision in precisions:
                building = partial(
                    build_best if precision == "best" else partial(build_package, precision=precision),
                    source=graphs,
                    target=compiler,
                    output=output,
                    batch=batch,
                    gate=gate,
                    command=_command_line(context, precisions=precision, target=target),
                    report=display.report,
                )
                try:
                    package = building()
                except GateError as error:
                    refused.append(str(error))
                    continue
                display.note_package(package)
                packages.append(package)
            if refused and {"int8", "best"} & set(precisions):
                refused += _rescues(graphs, preparation)
        if any(package.manifest.evidence for package in packages):
            display.note(_table(packages))
    if refused:
        raise click.ClickException("\n".join(refused))


@click.command(context_settings=_HELP)
@_source_argument("CHECKPOINT|MODEL")
@click.option(
    "-p",
    "--precision",
    "precisions",
    callback=_one_or_more_of(get_args(Precision)),
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
@_preparation_options
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
    with _clear_errors(), _Display() as display:
        if output.exists() and not is_kit(output):
            raise KitError(f"{output} exists and is not a build kit; choose another --output")
        rests = list(dict.fromkeys(INT8_REST[target] for target in targets))
        with _prepare(source, preparation, display) as prepared:
            from builder.preparation import write_kit

            command = _command_line(context, precisions=",".join(precisions))
            kit = write_kit(prepared, output, precisions, rests, command)
        display.note(f"{output}: {', '.join(graph.file for graph in kit.graphs)}")
        display.note(f"Next, on the device:  [bold]trimrt build {output}[/]")


class _StepsColumn(BarColumn):
    """A bar for what has a known number of steps."""

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
        """The bar, or nothing."""
        return Text() if task.total is None else super().render(task)


class _Display:
    """Where the work stands, on standard error: one line that changes, below lines that stay."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            _StepsColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self.progress.add_task("", total=None)

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def report(self, text: str) -> None:
        """What is being done now."""
        self.progress.update(self._task, description=text)

    def listener(self) -> BuildListener:
        """Shows TensorRT's build phases as bars below the line that changes."""
        return RichListener(self.progress)

    def note(self, text: RenderableType) -> None:
        """What was found, to stay."""
        self.progress.console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    def note_package(self, package: Package) -> None:
        """Where a package is, and what it took."""
        for line in package.rejected:
            self.note(f"[yellow]rejected[/] {escape(line)}")
        self.note(f"[green]published[/] {escape(str(package.folder))} (version {package.manifest.version})")
        if package.unverified is not None:
            self.note(f"[yellow]NOT verified[/]: {escape(package.unverified)}")


def _table(packages: Sequence[Package]) -> Table:
    table = Table(box=SIMPLE_HEAD, caption="FP32: PyTorch's top-1. Speed: the engine alone, on this machine.")
    table.add_column("precision", no_wrap=True)
    for heading in ("weights", "FP32", "top-1", "agreement", "one image", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for package in packages:
        evidence = package.manifest.evidence
        if evidence is not None:
            table.add_row(
                package.manifest.precision,
                f"{evidence.weights_bytes / 1e6:.2f} MB",
                f"{evidence.reference_top1:.2%}",
                f"{evidence.engine_top1:.2%}",
                f"{evidence.label_agreement:.2%}",
                f"{evidence.latency_ms:.2f} ms",
                f"{evidence.throughput:,.0f}",
            )
    return table


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What a user can act on becomes a message; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (
        CheckpointError,
        CompileError,
        DatasetError,
        EngineError,
        ExportError,
        KitError,
        PublicationError,
    ) as error:
        raise click.ClickException(str(error)) from error


def _batch_sizes(smallest: int, best: int, largest: int) -> BatchSizes:
    if not smallest <= best <= largest:
        raise click.UsageError(
            f"batch sizes must be ordered: --min-batch {smallest}, --opt-batch {best}, --max-batch {largest}"
        )
    return BatchSizes(min=smallest, opt=best, max=largest)


@contextmanager
def _open(
    context: click.Context, source: str, preparation: dict[str, Any], display: _Display
) -> Iterator[GraphSource]:
    """The build kit, checkpoint or model that `source` names."""
    if not is_kit(Path(source)):
        with _prepare(source, preparation, display) as prepared:
            yield prepared
        return
    given = [name for name in preparation if _is_typed(context, name)]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(
            f"{source} is a build kit, whose images and calibration are fixed; leave out {options}"
        )
    display.report("checking the build kit")
    yield open_kit(Path(source))


@contextmanager
def _prepare(source: str, preparation: dict[str, Any], display: _Display) -> Iterator[Preparation]:
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
        from builder.preparation import Settings, open_checkpoint, prepare
        from builder.sources import Details, open_named, open_onnx
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
        prepared = prepare(subject, Path(workspace), settings, display.report, display.progress)
        display.note(f"the exported graph's logits differ by {prepared.export_difference:.1e} at most")
        if settings.sensitivity:
            display.note(_ranking(prepared.layer_costs))
        yield prepared


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


def _is_typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _command_line(context: click.Context, **chosen: str) -> str:
    """The command that does this again, with what was chosen for some parameters."""
    words = ["trimrt", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        value = chosen.get(name, context.params[name])
        if name not in chosen and not _is_typed(context, name):
            continue
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for item in value if isinstance(value, tuple) else (value,):
            option = [] if isinstance(parameter, click.Argument) else [max(parameter.opts, key=len)]
            words += [*option, str(item)]
    return shlex.join(words)
