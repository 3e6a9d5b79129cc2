"""`trimrt build`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import click

from builder import BuildOptions, Gate, PrepareOptions, TensorRTOptions
from builder import build as build_packages
from builder.compile.packages import Package
from builder.compile.selection import Objective
from builder.compile.targets.base import INT8_REST
from runtime.manifest import Backend, BatchSizes, Precision
from runtime.signatures import Trust
from trimrt.display import Display
from trimrt.options import (
    COUNT,
    ENGINES,
    FOLDER,
    HELP,
    Choice,
    Command,
    one_or_more_of,
    options_of,
    take,
    trusted_key_option,
)


def _profiles(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> list[BatchSizes]:
    sizes = []
    for text in texts:
        try:
            low, best, high = (int(part) for part in text.split(":"))
            sizes.append(BatchSizes(min=low, opt=best, max=high))
        except ValueError:
            raise click.UsageError(
                f"--profile {text}: that is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"
            ) from None
    return sizes


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt build digits-resnet18 -p fp32,fp16,int8",
        "trimrt build model.onnx --data photos --preprocess imagenet",
        "trimrt build photos-kit --target tensorrt -p fp16,int8",
    ],
)
@click.argument("source", metavar="CHECKPOINT|KIT|MODEL")
@click.option(
    "-p",
    "--precision",
    "precisions",
    callback=one_or_more_of((*get_args(Precision), "best")),
    metavar="LIST",
    show_default="int8; of tensorrt-rtx fp16",
    help=f"One or more of {', '.join(get_args(Precision))}, separated by commas; or best: the fastest that "
    "passes the gate of int8, fp16 (fp32 for OpenVINO) and, on GPUs, int8 with residual sums or the first "
    "layer left in fp16.",
)
@click.option(
    "--target",
    type=Choice(["auto", *INT8_REST]),
    default="auto",
    help="What to compile for; auto takes TensorRT where it and a GPU are, else OpenVINO.",
)
@click.option(
    "-o", "--output", type=FOLDER, default=ENGINES, help="Folder that the packages' folders go into."
)
@click.option(
    "--objective",
    type=Choice(get_args(Objective)),
    default="latency",
    help="What --precision best prefers: less time for one image, or more images a second.",
)
@click.option("--min-batch", type=COUNT, default=1, help="Least images in a batch.")
@click.option("--opt-batch", type=COUNT, default=8, help="What it is tuned for.")
@click.option("--max-batch", type=COUNT, default=32, help="Most images in a batch.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    default=0.5,
    help="Refuse an engine that loses more top-1 accuracy than this, in points.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 100),
    default=98.0,
    help="Refuse an engine that labels fewer validation images as the FP32 network does, in percent.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="MIN:OPT:MAX",
    callback=_profiles,
    help="TensorRT: sizes to tune for, instead of one image and, by --opt-batch, the larger batches; "
    "repeatable.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="tensorrt-rtx: a GPU to compile for; repeatable.  [default: Ampere and later]",
)
@click.option(
    "--replace", is_flag=True, help="Replace packages of the same name that were made of another network."
)
@trusted_key_option
@options_of(TensorRTOptions)
@options_of(PrepareOptions)
def build(
    source: str,
    precisions: Sequence[Precision | Literal["best"]] | None,
    target: Backend | Literal["auto"],
    output: Path,
    objective: Objective,
    min_batch: int,
    opt_batch: int,
    max_batch: int,
    max_drop: float,
    min_agreement: float,
    replace: bool,
    trust: Trust,
    **values: Any,
) -> None:
    """Compile a student into engine packages, and publish those that pass the accuracy gate.

    From a CHECKPOINT (`trimrt compress`), its folder or name: export, conversion to each precision and
    compilation. From a build KIT (`trimrt prepare`): compilation alone, which needs neither torch nor
    ModelOpt. A MODEL that was not made here is an ONNX file, a file of weights (with --architecture, unless
    it says whose), or torchvision:NAME or timm:NAME with --weights; it needs --data.

    Each engine runs on held-out validation images. One that fails the accuracy gate is not published, and
    the exit code is not 0.
    """
    options = BuildOptions(
        precisions=precisions,
        target=target,
        batch=_batch_sizes(min_batch, opt_batch, max_batch),
        gate=Gate(max_drop=max_drop / 100, min_agreement=min_agreement / 100),
        tensorrt=take(TensorRTOptions, values),
        prepare=take(PrepareOptions, values),
        objective=objective,
        replace=replace,
        trust=trust,
    )
    run_build(source, output, options)


def run_build(source: str | Path, output: Path, options: BuildOptions) -> list[Package]:
    """Build packages as `builder.build` does, and show how it goes."""
    with Display() as display:
        try:
            return build_packages(source, output, options, display)
        finally:
            display.note_evidence()


def _batch_sizes(smallest: int, best: int, largest: int) -> BatchSizes:
    if not smallest <= best <= largest:
        raise click.UsageError(
            f"batch sizes must be ordered: --min-batch {smallest}, --opt-batch {best}, --max-batch {largest}"
        )
    return BatchSizes(min=smallest, opt=best, max=largest)
