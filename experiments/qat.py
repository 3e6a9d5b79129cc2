"""Quantisation-aware training where calibration alone fails: `python -m experiments.qat`.

A student in which INT8 must fail, and for a known reason: inside two residual blocks of the student that
ships with TrimRT, one channel is made a thousand times larger, and the next convolution's weights for it
as much smaller. It computes what it did before, but in INT8 that channel takes the whole range of its
tensor, and nothing is left for the others: what Nagel et al. 2019 (https://arxiv.org/abs/1906.04721,
section 3) find in trained networks, in a pure form.

Then the builder does what `trimrt build --qat` does: each way of calibrating meets the accuracy gate, and
then the fine-tuned network does. Test images decide nothing; they are measured after it.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import torch
from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import Progress

from builder.compile.packages import build_package
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate, GateError
from builder.prepare.options import QAT, PrepareOptions
from builder.prepare.preparation import Preparation, open_checkpoint, prepare
from experiments.graphs import Measured, held_out_images, measure_graph
from experiments.markdown import megabytes, percent
from experiments.markdown import table as markdown_table
from experiments.results import FOLDER, Made, made_here
from models.checkpoint import load_checkpoint, save_checkpoint
from models.pretrained import DIGITS_STUDENT
from runtime.manifest import BatchSizes, Precision
from runtime.profiling import profile_layers
from trimrt.options import FILE, HELP

BLOCKS: Final = ("layer2.0", "layer3.0")
FACTOR: Final = 1000.0
SEEDS: Final = (0, 1, 2)

_NAMES: Final = {"fp32": "FP32", "entropy": "INT8, entropy", "max": "INT8, max", "qat": "INT8, QAT"}


class Row(BaseModel):
    """One graph of the student."""

    graph: str = Field(description="fp32, or how INT8 was calibrated")
    seed: int = Field(description="of the choice of calibration images and of the training")
    measured: Measured


class Results(Made):
    """One run."""

    threads: int = Field(description="of the training; other numbers give other weights")
    cpu_seconds: float = Field(description="processor time of the whole run")
    student: str
    blocks: list[str] = Field(description="that have a larger channel")
    factor: float
    epochs: int
    learning_rate: float
    training_images: int
    calibration_images: int
    rows: list[Row]
    published: list[str] = Field(description="for each seed the first graph to pass the gate, or none")
    int8_convolutions: int = Field(description="of the last published engine, as OpenVINO runs it")
    convolutions: int


def write_outliers(checkpoint: Path, folder: Path, blocks: Sequence[str] = BLOCKS) -> Path:
    """Save the ResNet in `checkpoint` to `folder`, with a larger channel in each of `blocks`."""
    network, card = load_checkpoint(checkpoint)
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name in blocks:
            block = modules[name]
            active = int((block.bn1.weight.abs() + block.bn1.bias).argmax())
            block.bn1.weight[active] *= FACTOR
            block.bn1.bias[active] *= FACTOR
            block.conv2.weight[:, active] /= FACTOR
    save_checkpoint(folder, network, card.model_copy(update={"name": folder.name}))
    return folder


def run(console: Console) -> Results:
    """Build the student with each seed, and measure every graph on the way."""
    results = Results(
        **made_here("python -m experiments.qat"),
        threads=torch.get_num_threads(),
        cpu_seconds=0,
        student=DIGITS_STUDENT.name,
        blocks=list(BLOCKS),
        factor=FACTOR,
        epochs=QAT.epochs,
        learning_rate=QAT.learning_rate,
        training_images=0,
        calibration_images=0,
        rows=[],
        published=[],
        int8_convolutions=0,
        convolutions=0,
    )
    with tempfile.TemporaryDirectory(prefix="trimrt-") as name, Progress(console=console) as progress:
        subject = open_checkpoint(write_outliers(DIGITS_STUDENT, Path(name) / "outliers"), None)
        results.training_images = len(subject.data.train)
        for seed in progress.track(SEEDS, description="seeds"):
            folder = Path(name) / str(seed)
            folder.mkdir()
            options = PrepareOptions(seed=seed, correction=False, rounding=False, sensitivity=False, qat=True)
            prepared = prepare(subject, folder, options, lambda _: None, progress)
            results.calibration_images = len(prepared.calibration)
            try:
                package = build_package(
                    prepared,
                    open_target("openvino"),
                    "int8",
                    folder / "engines",
                    batch=BatchSizes(min=1, opt=8, max=32),
                    gate=Gate(),
                    command=results.command,
                    report=lambda _: None,
                )
            except GateError:
                results.published.append("none")
            else:
                calibration = package.manifest.provenance.calibration
                assert calibration is not None, "of an INT8 engine"
                results.published.append(calibration.method)
                layers = profile_layers(package.folder, batch=1, runs=1)
                kernels = [layer.kernel for layer in layers if layer.kind == "Convolution"]
                results.int8_convolutions = sum(kernel.endswith(("I8", "i8")) for kernel in kernels)
                results.convolutions = len(kernels)
            results.rows += _rows(prepared)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    results.cpu_seconds = round(usage.ru_utime + usage.ru_stime, 1)
    return results


def _rows(prepared: Preparation) -> list[Row]:
    test, seed = held_out_images(prepared.subject), prepared.options.seed
    precisions: tuple[Precision, ...] = ("int8",) if seed else ("fp32", "int8")
    return [
        Row(
            graph=graph.calibration.method if graph.calibration else precision,
            seed=seed,
            measured=measure_graph(path, prepared.verification, test),
        )
        for precision in precisions
        for graph, path in prepared.graphs(precision, "fp32")
    ]


def table(results: Results) -> str:
    """Markdown: a row for each graph and seed."""
    lines = []
    for row in sorted(results.rows, key=lambda row: list(_NAMES).index(row.graph)):
        validation, test = row.measured.validation, row.measured.test
        lines.append(
            [
                _NAMES[row.graph] + ("" if row.graph == "fp32" else f", seed {row.seed}"),
                percent(1 - validation.wrong / validation.images),
                percent(validation.agreement),
                "refused" if row.measured.refused else "passes",
                f"{test.wrong} of {test.images}",
                percent(test.agreement),
                megabytes(row.measured.bytes),
            ]
        )
    head = ["validation: top-1", "agreement", "gate", "test: wrong", "agreement", "size"]
    return markdown_table(["graph", *head], lines)


@click.command(context_settings=HELP)
@click.option("--out", type=FILE, default=FOLDER / "qat.json", show_default="experiments/results/qat.json")
def main(out: Path) -> None:
    """Show a network that no calibration gets through the accuracy gate, and that QAT does."""
    console = Console()
    results = run(console)
    results.write(out)
    console.print(table(results), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
