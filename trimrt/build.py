"""`trimrt build`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from builder.compile.packages import Package, build_package
from builder.compile.selection import build_best
from builder.compile.targets.base import INT8_REST
from builder.compile.targets.choice import choose_backend, open_target
from builder.compile.targets.tensorrt.flags import build_options, tensorrt_options
from builder.compile.verification import Gate, GateError
from builder.kit import GraphSource, Kit, is_kit, open_kit
from runtime.manifest import Backend, BatchSizes, Precision
from trimrt.display import Display
from trimrt.preparing import (
    HELP,
    command_line,
    is_typed,
    one_or_more_of,
    preparation_options,
    prepared,
    source_argument,
)


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


@click.command(context_settings=HELP)
@source_argument("CHECKPOINT|KIT|MODEL")
@click.option(
    "-p",
    "--precision",
    "precisions",
    callback=one_or_more_of((*get_args(Precision), "best")),
    metavar="LIST",
    default="int8",
    show_default=True,
    help=f"One or more of {', '.join(get_args(Precision))}, separated by commas; or best: the faster one of "
    "int8 and fp16 (fp32 for OpenVINO) that passes the gate.",
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
@preparation_options
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
    with Display() as display:
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
                    command=command_line(context, precisions=precision, target=target),
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


def _batch_sizes(smallest: int, best: int, largest: int) -> BatchSizes:
    if not smallest <= best <= largest:
        raise click.UsageError(
            f"batch sizes must be ordered: --min-batch {smallest}, --opt-batch {best}, --max-batch {largest}"
        )
    return BatchSizes(min=smallest, opt=best, max=largest)


@contextmanager
def _open(
    context: click.Context, source: str, preparation: dict[str, Any], display: Display
) -> Iterator[GraphSource]:
    """The build kit, checkpoint or model that `source` names."""
    if not is_kit(Path(source)):
        with prepared(source, preparation, display) as graphs:
            yield graphs
        return
    given = [name for name in preparation if is_typed(context, name)]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(
            f"{source} is a build kit, whose images and calibration are fixed; leave out {options}"
        )
    display.report("checking the build kit")
    yield open_kit(Path(source))
