"""`python -m experiments.architectures`: what can be done with torchvision's classifiers and timm's families.

Weights are random and nothing is downloaded: what is asked is whether an architecture can be trained, pruned,
exported and quantised at all, not how accurate it is.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
import numpy as np
import onnx
import torch
from pydantic import BaseModel, Field
from rich.console import Console
from torch import nn

from builder.prepare.export import ExportError, export_onnx, run_onnx
from builder.prepare.int8 import convert_to_int8
from builder.prepare.legality import require_legal
from builder.prepare.mac_share import int8_share
from experiments.markdown import table as markdown_table
from experiments.results import FOLDER, Made, made_here
from models.errors import TrimRTError
from models.evaluation import count_macs, count_parameters, normalise, predict_logits, to_float
from models.networks import TIMM, NetworkError, architectures, build_network, skeleton
from models.preprocessing import Pixels, Preprocessing
from models.recipe import Pruning
from models.suitability import own_size, require_prunable, require_trainable
from trimrt.options import FILE, HELP

CLASSES: Final = 10
RATIO: Final = 0.5
SIZES: Final = (64, 128, 224)  # pixels; the smallest that an architecture takes, to save time
LONGEST: Final = 30.0  # seconds of processor time to find out what can be pruned
IMAGES: Final = 32  # crops of photographs, to calibrate and to compare with

# One small network of each of timm's families (its modules).
FAMILIES: Final = tuple(
    f"{TIMM}{name}"
    for name in (
        *("resnet10t", "resnest14d", "skresnet18", "res2net50_14w_8s", "vgg11", "densenet121", "dla46x_c"),
        *(
            "regnetx_002",
            "gernet_s",
            "repvgg_a0",
            "mobileone_s0",
            "cs3darknet_focus_s",
            "ese_vovnet19b_slim_dw",
        ),
        *("hrnet_w18_small", "selecsls42", "hgnetv2_b0", "rexnetr_100", "nf_regnet_b0", "xception41"),
        *("efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small_050", "mnasnet_small"),
        *("lcnet_035", "tinynet_e", "hardcorenas_a", "fbnetc_100", "mixnet_s", "ghostnet_050"),
        *(
            "repghostnet_050",
            "repvit_m0_9",
            "starnet_s050",
            "fastvit_t8",
            "efficientvit_b0",
            "efficientvit_m0",
        ),
        *("convnext_atto", "inception_next_atto", "convmixer_768_32", "mambaout_femto", "poolformer_s12"),
        *(
            "edgenext_xx_small",
            "mobilevit_xxs",
            "mobilevitv2_050",
            "efficientformer_l1",
            "efficientformerv2_s0",
        ),
        *("levit_128s", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "tiny_vit_5m_224", "pit_ti_224"),
        *(
            "swin_tiny_patch4_window7_224",
            "pvt_v2_b0",
            "coat_lite_tiny",
            "crossvit_tiny_240",
            "cait_xxs24_224",
        ),
        *("xcit_nano_12_p16_224", "mixer_s32_224", "resmlp_12_224", "visformer_tiny", "convit_tiny"),
    )
)


class Graph(BaseModel):
    """The exported network.

    Attributes:
        difference: the largest of its logits' from the network's, as a share of their standard deviation.
        agreement: share of images with the same label.
        int8_share: of the multiply-accumulates, in the INT8 graph.
    """

    difference: float
    agreement: float
    int8_share: float


class Row(BaseModel):
    """One architecture, with random weights."""

    name: str
    size: int | None = Field(description="side of its images, in pixels; None: it takes none of those tried")
    parameters: int = 0
    macs: int = 0
    refused: str | None = Field(default=None, description="why it cannot be trained")
    pruned_macs: float | None = Field(default=None, description="share that is left after pruning")
    unprunable: str | None = Field(default=None, description="why it cannot be pruned")
    refusal_seconds: float | None = Field(
        default=None, description="of processor time, until that was told; None: it was given up"
    )
    graph: Graph | None = Field(default=None, description="None: not exported, or `unbuildable`")
    unbuildable: str | None = Field(default=None, description="why it cannot be exported and quantised")

    @property
    def has_graph(self) -> bool:
        """Whether export was tried."""
        return self.graph is not None or self.unbuildable is not None or self.refused is not None


class Results(Made):
    """All architectures so far."""

    seconds: float = Field(description="of processor time")
    rows: list[Row]


def measure(name: str, *, graph: bool) -> Row:
    """Try everything with one architecture.

    Args:
        name: a name of torchvision's, or `timm:NAME`.
        graph: also export and quantise it, which takes the most time.
    """
    unallocated = skeleton(lambda: build_network(name, CLASSES))
    own = own_size(unallocated)
    refused = None
    for size in sorted({*SIZES, *([own] if own else [])}):
        spec = Preprocessing(resize=size, height=size, width=size)
        try:
            require_trainable(name, CLASSES, "standard", spec)
            break
        except NetworkError as error:
            refused = str(error)
    else:
        return Row(name=name, size=None, refused=refused)
    empty = unallocated.to("meta").eval()
    macs = count_macs(empty, size, size)
    row = Row(name=name, size=size, parameters=count_parameters(empty), macs=macs)
    started = time.process_time()
    try:
        with _limited(LONGEST):
            pruned = require_prunable(name, CLASSES, "standard", spec, Pruning(ratio=RATIO))
        row.pruned_macs = count_macs(pruned.to("meta").eval(), size, size) / macs
    except TrimRTError as error:
        row.unprunable, row.refusal_seconds = str(error), round(time.process_time() - started, 2)
    except _TooLong:
        row.unprunable = f"torch-pruning takes longer than {LONGEST:g} s to follow it"
    if graph:
        try:
            row.graph = _export(name, spec)
        except (ExportError, TrimRTError) as error:
            row.unbuildable = str(error)
    return row


class _TooLong(BaseException):
    """Not an `Exception`: whoever catches those takes them for the network's."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` once that much processor time has passed."""

    def stop(_signal: int, _frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _export(name: str, spec: Preprocessing) -> Graph:
    torch.manual_seed(0)
    network = build_network(name, CLASSES)
    pixels = photographs(spec.height)
    _measure_activations(network, pixels, spec)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as folder:
        master, quantised = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        export_onnx(network, spec, master)
        expected, found = predict_logits(network, pixels, spec).numpy(), run_onnx(master, pixels)
        convert_to_int8(master, quantised, pixels, method="max", rest="fp32")
        model = onnx.load(str(quantised))
        require_legal(model)
        return Graph(
            difference=float(np.abs(found - expected).max() / expected.std()),
            agreement=float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1))),
            int8_share=int8_share(model),
        )


def _measure_activations(network: nn.Module, pixels: Pixels, spec: Preprocessing) -> None:
    """Give batch normalisations the images' statistics: else activations of deep random networks vanish."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        network.train()(normalise(to_float(pixels, torch.device("cpu")), spec))
    network.eval()


def photographs(size: int) -> Pixels:
    """Crops of the two photographs that scikit-learn ships, uint8, shape (IMAGES, size, size, 3)."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    crops = []
    for place in range(IMAGES):
        image = load_sample_images().images[place % 2]
        top, left = (int(draw.integers(side - size)) for side in image.shape[:2])
        crops.append(image[top : top + size, left : left + size])
    return np.stack(crops)


def names_of(library: str) -> Sequence[str]:
    """The architectures of one library that are tried."""
    return FAMILIES if library == "timm" else architectures()


def table(results: Results, library: str) -> str:
    """Markdown: the architectures of one library."""
    known = {row.name: row for row in results.rows}
    rows = []
    for architecture in names_of(library):
        name = f"`{architecture}`"
        row = known.get(architecture)
        if row is None:
            rows.append([name, "", "", "not tried", "not tried", "", ""])
            continue
        if row.size is None:
            rows.append([name, "", "", f"refused: {_reason(row.refused)}", "", "", ""])
            continue
        pruned = f"{row.pruned_macs:.0%}" if row.pruned_macs is not None else f"no: {_reason(row.unprunable)}"
        graph = ["not tried", "", ""]
        if row.unbuildable is not None:
            graph = [f"no: {_reason(row.unbuildable)}", "", ""]
        elif row.graph is not None:
            exported = row.graph
            graph = [f"{exported.agreement:.0%}", f"{exported.difference:.0e}", f"{exported.int8_share:.0%}"]
        rows.append([name, str(row.size), f"{row.parameters / 1e6:.1f}", pruned, *graph])
    head = ["architecture", "pixels", "M parameters", "MACs left", "export: labels", "logits differ", "INT8"]
    return markdown_table(head, rows)


def summary(results: Results) -> str:
    """How many can do what, of each library."""
    lines = []
    for library in ("torchvision", "timm"):
        names = names_of(library)
        rows = [row for row in results.rows if row.name in names]
        tried = [row for row in rows if row.graph is not None or row.unbuildable is not None]
        exported = sum(row.graph is not None for row in tried)
        pruned = sum(row.pruned_macs is not None for row in rows)
        trained = sum(row.size is not None for row in rows)
        lines.append(
            f"- {library}, {len(names)} names, {len(rows)} of them tried: {trained} can be trained and "
            f"{pruned} pruned; {exported} of {len(tried)} can be exported and quantised.\n"
        )
    slowest = max(results.rows, key=lambda row: row.refusal_seconds or 0)
    lines.append(
        f"- The slowest refusal took {slowest.refusal_seconds} s of processor time: `{slowest.name}`.\n"
    )
    return "".join(lines)


def _reason(text: str | None) -> str:
    """Why, without the name before it and the advice after it."""
    reason = (text or "").split(";")[0]
    for known in ("linear layers, in ", "cannot be pruned: ", "cannot follow this network "):
        reason = reason.partition(known)[2] or reason
    return reason.strip("()").replace("|", "/")


@click.command(context_settings=HELP)
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option(
    "--graphs/--no-graphs", default=True, help="Export and quantise as well, which takes the most time."
)
@click.option("--minutes", type=click.FloatRange(0), help="Of processor time, after which no other is begun.")
@click.option(
    "--out",
    type=FILE,
    default=FOLDER / "architectures.json",
    show_default="experiments/results/architectures.json",
)
def main(names: Sequence[str], graphs: bool, minutes: float | None, out: Path) -> None:
    """Try the architectures NAME..., by default torchvision's and one of each of timm's families.

    What --out has already is not tried again: an interrupted run goes on.
    """
    results = Results(**made_here("python -m experiments.architectures"), seconds=0, rows=[])
    if out.exists():
        earlier = Results.model_validate_json(out.read_text(encoding="utf-8"))
        if earlier.versions == results.versions:
            results = earlier
    everything = [*architectures(), *FAMILIES]
    console = Console()
    known = {row.name: row for row in results.rows}
    for name in names or everything:
        if name in known and (known[name].has_graph or not graphs):
            continue
        if minutes is not None and time.process_time() > 60 * minutes:
            break
        started = time.process_time()
        known[name] = measure(name, graph=graphs)
        results.seconds = round(results.seconds + time.process_time() - started, 1)
        results.rows = sorted(known.values(), key=lambda row: everything.index(row.name))
        results.write(out)
        console.print(known[name].model_dump_json(exclude_none=True), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
