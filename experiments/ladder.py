"""What each way to static INT8 gains: all that `trimrt build` would try, on images that none has seen.

    python -m experiments.ladder model.onnx --data photos/ --unlabelled --preprocess=-1..1 --unseen new

Every graph is held against FP32 by exact sums, on the validation images, which decide, and on unseen ones.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from pydantic import BaseModel, Field
from rich.console import Console

from builder import PrepareOptions
from builder.prepare.preparation import prepare
from builder.prepare.qdq import exact_logits
from builder.prepare.sources import open_onnx
from builder.prepare.unlabelled import open_unlabelled
from experiments.markdown import percent
from experiments.markdown import table as markdown_table
from experiments.results import FOLDER, Made, made_here
from trimrt.options import FILE, HELP, options_of, take


class Row(BaseModel):
    """One way to INT8, taken with one network."""

    network: str
    way: str
    seconds: float = Field(description="that making the graph took")
    higher_precision: float = Field(description="share of the multiply-accumulates that are not in INT8")
    validation: float = Field(description="share of the validation images that it labels as FP32 does")
    unseen: float = Field(description="the same of the unseen images")
    error: float = Field(description="root mean square of the logits' change on them, relative to theirs")


class Results(Made):
    """All networks, in the order in which they were given."""

    calibration_images: int
    validation_images: int
    unseen_images: int
    rows: list[Row]


def climb(model: Path, options: PrepareOptions, unseen: Path, report: Callable[[str], None]) -> Iterator[Row]:
    """Make every graph of the network in an ONNX file, and hold it against FP32."""
    subject = open_onnx(model, options)
    images = open_unlabelled(str(unseen))
    spec = subject.student.preprocessing
    parts = [part.load_pixels(spec, progress=False) for part in (images.train, images.validation)]
    pixels = np.concatenate(parts)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as folder:
        prepared = prepare(subject, Path(folder), options, report)
        reference = exact_logits(onnx.load(str(prepared.master)), pixels)
        for graph, path in prepared.graphs("int8", "fp32"):
            assert graph.calibration is not None, "of an INT8 graph"
            assert graph.exact is not None, "it was not fine-tuned"
            logits = exact_logits(onnx.load(str(path)), pixels)
            yield Row(
                network=model.stem,
                way=graph.calibration.name,
                seconds=round(graph.seconds or 0, 1),
                higher_precision=1 - (graph.int8_share or 0),
                validation=graph.exact.label_agreement,
                unseen=float(np.mean(logits.argmax(1) == reference.argmax(1))),
                error=float(np.sqrt(np.mean((logits - reference) ** 2) / np.mean(reference**2))),
            )


def table(results: Results) -> str:
    """Markdown: the ways of each network, in order."""
    head = ["network", "way", "seconds", "not INT8", "validation", "unseen images", "logits' error"]
    lines, before = [], None
    for row in results.rows:
        lines.append(
            [
                row.network if row.network != before else "",
                row.way,
                f"{row.seconds:.0f}",
                percent(row.higher_precision),
                percent(row.validation),
                percent(row.unseen),
                percent(row.error),
            ]
        )
        before = row.network
    return markdown_table(head, lines, left=2)


@click.command(context_settings=HELP)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=FILE)
@click.option("--unseen", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--out", type=FILE, default=FOLDER / "ladder.json")
@options_of(PrepareOptions)
def main(models: tuple[Path, ...], unseen: Path, out: Path, **values: Any) -> None:
    """Make all INT8 graphs of MODEL..., and add what comes out to --out, in place of older figures."""
    options = take(PrepareOptions, values)
    command = shlex.join(["python", "-m", "experiments.ladder", *sys.argv[1:]])
    rows: list[Row] = []
    if out.exists():
        earlier = Results.model_validate_json(out.read_text(encoding="utf-8"))
        rows = [row for row in earlier.rows if row.network not in {model.stem for model in models}]
    console = Console()
    results = Results(
        **made_here(command),
        calibration_images=options.calibration_images,
        validation_images=options.verification_images,
        unseen_images=sum(path.is_file() for path in unseen.iterdir()),
        rows=rows,
    )
    for model in models:
        for row in climb(model, options, unseen, lambda _: None):
            console.print(f"{row.way}: {percent(row.unseen)}", highlight=False)
            results.rows.append(row)
            results.write(out)
    console.print(table(results), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
