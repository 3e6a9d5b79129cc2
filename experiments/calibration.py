"""How INT8 should be calibrated: methods, numbers of images, and two mistakes that are often made.

    python -m experiments.calibration runs/digits-fold?-aligned --out experiments/results/calibration.json

Each folder is a run of `trimrt compress`, whose pruned checkpoint is taken, or a checkpoint. The mistakes
are made here and cannot be made in the product, whose graphs take pixels: calibration images that are not
normalised, whether scaled to 0..1 or not even that, for a network that then meets normalised ones.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import Progress

from builder.kit import INPUT
from builder.prepare.int8 import METHODS, Method, convert_to_int8
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Preparation, open_checkpoint, prepare
from experiments.graphs import Measured, held_out_images, measure_graph
from experiments.markdown import percents, spread
from experiments.markdown import table as markdown_table
from experiments.results import FOLDER, Made, made_here
from models.card import CARD_NAME, CheckpointError, read_card
from models.datasets import DatasetError
from models.preprocessing import Pixels
from trimrt.options import FILE, HELP

if TYPE_CHECKING:
    import onnx

IMAGES: Final = (32, 128, 512)
PERCENTILE: Final = 99.99

# What the network is given instead of (pixel - mean) / std.
MISTAKES: Final = {"pixels of 0..1, not normalised": 1 / 255, "pixels of 0..255": 1.0}

_BINS: Final = 4096
_LEVELS: Final = 127
_BATCH: Final = 32


@dataclass(frozen=True)
class Variant:
    """A way to calibrate.

    Attributes:
        method: of `builder.prepare.int8`, `percentile`, or `none` for the FP32 graph.
        images: training images to calibrate with.
        mistake: one of `MISTAKES`.
    """

    method: str
    images: int
    mistake: str | None = None


VARIANTS: Final = (
    Variant("none", 0),
    *(Variant(method, images) for method in (*METHODS, "percentile") for images in IMAGES),
    *(Variant(method, max(IMAGES), mistake) for mistake in MISTAKES for method in METHODS),
)


class Row(BaseModel):
    """One checkpoint, calibrated in one way."""

    checkpoint: str
    weights_sha256: str
    fold: int | None
    parameters: int
    method: str
    images: int
    mistake: str | None
    measured: Measured

    @property
    def variant(self) -> Variant:
        """How it was calibrated."""
        return Variant(self.method, self.images, self.mistake)


class Results(Made):
    """All checkpoints, in the order in which they were given."""

    seconds: float = Field(description="on a machine that may have had other work")
    rows: list[Row]


def measure(folder: Path, variants: Sequence[Variant] = VARIANTS) -> Iterator[Row]:
    """Calibrate the checkpoint in `folder` in each way, and run what comes out.

    Raises:
        CheckpointError: no checkpoint there.
        DatasetError: its data cannot be found.
    """
    checkpoint = _checkpoint(folder)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as name:
        prepared = prepare(open_checkpoint(checkpoint, None), Path(name), PrepareOptions(), lambda _: None)
        test = held_out_images(prepared.subject)
        for variant in variants:
            graph = prepared.master
            if variant.method != "none":
                graph = Path(name) / "variant.onnx"
                calibrate(prepared, variant, graph)
            yield Row(
                checkpoint=str(checkpoint),
                weights_sha256=str(prepared.student.checkpoint_sha256),
                fold=prepared.subject.data.fold,
                parameters=prepared.student.parameters or 0,
                method=variant.method,
                images=variant.images,
                mistake=variant.mistake,
                measured=measure_graph(graph, prepared.verification, test),
            )


def _checkpoint(folder: Path) -> Path:
    return folder if (folder / CARD_NAME).exists() else folder / "pruned"


def calibrate(prepared: Preparation, variant: Variant, path: Path) -> None:
    """Write the static INT8 graph to `path`."""
    import onnx

    train = prepared.subject.data.train
    # Of one order, so that a larger set has all images of a smaller one.
    chosen = np.random.default_rng(prepared.options.seed).permutation(len(train))[: variant.images]
    images = train.subset(np.sort(chosen), "calibration")
    pixels = images.load_pixels(prepared.student.preprocessing, progress=False)
    method: Method = "entropy" if variant.method == "entropy" else "max"
    master, normalisation = path.with_name("master.onnx"), {}
    model = onnx.load(str(prepared.master))
    if variant.mistake is not None:
        scale = np.float32(MISTAKES[variant.mistake])
        normalisation = _replace_constants(model, {"pre/mean": np.float32(0), "pre/inverse_std": scale})
    onnx.save(model, str(master))
    convert_to_int8(master, path, pixels, method=method, rest="fp32")
    quantised = onnx.load(str(path))
    _replace_constants(quantised, normalisation)
    if variant.method == "percentile":
        _replace_constants(quantised, _percentile_scales(model, quantised, pixels))
    onnx.save(quantised, str(path))


def _replace_constants(
    model: onnx.ModelProto, values: Mapping[str, NDArray[np.float32] | np.float32]
) -> dict[str, NDArray[np.float32]]:
    """Give constants of a graph other values, spread over their shapes.

    Returns:
        The values that they had.
    """
    from onnx import numpy_helper

    before = {}
    for tensor in model.graph.initializer:
        if tensor.name in values:
            before[tensor.name] = numpy_helper.to_array(tensor)
            new = np.broadcast_to(values[tensor.name], before[tensor.name].shape).copy()
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    assert len(before) == len(values), f"not in the graph: {set(values) - set(before)}"
    return before


def _percentile_scales(
    master: onnx.ModelProto, quantised: onnx.ModelProto, pixels: Pixels
) -> dict[str, np.float32]:
    """The scales of activations that clip all but `PERCENTILE` percent of their magnitudes.

    Args:
        master: the FP32 graph.
        quantised: calibrated by the largest magnitude, on the same images.
        pixels: these images.

    Returns:
        By the names of the constants in `quantised`.
    """
    import onnxruntime
    from onnx import ModelProto, ValueInfoProto, numpy_helper

    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    scales = {
        node.input[0]: node.input[1] for node in quantised.graph.node if node.op_type == "QuantizeLinear"
    }
    largest = {
        tensor: _LEVELS * float(numpy_helper.to_array(constants[scale])) for tensor, scale in scales.items()
    }
    watched = ModelProto()
    watched.CopyFrom(master)
    watched.graph.output.extend(ValueInfoProto(name=tensor) for tensor in scales)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    counts = {tensor: np.zeros(_BINS) for tensor in scales}
    for part in np.array_split(pixels, -(-len(pixels) // _BATCH)):
        for tensor, values in zip(scales, session.run(list(scales), {INPUT: part}), strict=True):
            counts[tensor] += np.histogram(np.abs(values), _BINS, (0, largest[tensor]))[0]
    found = {}
    for tensor, scale in scales.items():
        share = np.cumsum(counts[tensor]) / counts[tensor].sum()
        kept = int(np.searchsorted(share, PERCENTILE / 100)) + 1
        found[scale] = np.float32(kept / _BINS * largest[tensor] / _LEVELS)
    return found


def table(results: Results) -> str:
    """Markdown: for each size of network a table, whose rows are over all folds."""
    parts = []
    for parameters in dict.fromkeys(row.parameters for row in results.rows):
        rows = [row for row in results.rows if row.parameters == parameters]
        lines = []
        for variant in dict.fromkeys(row.variant for row in rows):
            found = [row.measured for row in rows if row.variant == variant]
            refused = sum(measured.refused is not None for measured in found)
            tests = [measured.test for measured in found]
            wrong, images = (sum(getattr(test, name) for test in tests) for name in ("wrong", "images"))
            lines.append(
                [
                    _name(variant),
                    percents([measured.validation.agreement for measured in found]),
                    f"{refused} of {len(found)}",
                    percents([test.agreement for test in tests]),
                    spread([test.max_logit_difference for test in tests], "{:.2f}".format),
                    f"{wrong} of {images}",
                ]
            )
        folds = len({row.checkpoint for row in rows})
        head = ["validation: agreement", "refused", "test: agreement", "largest logit difference", "wrong"]
        parts.append(
            f"{parameters / 1e6:.3f} M parameters, {folds} {'folds' if folds > 1 else 'fold'}:\n\n"
            + markdown_table(["calibration", *head], lines)
        )
    return "\n".join(parts)


def _name(variant: Variant) -> str:
    if variant.method == "none":
        return "none: FP32"
    mistake = f"; {variant.mistake}" if variant.mistake else ""
    return f"{variant.method}, {variant.images} images{mistake}"


@click.command(context_settings=HELP)
@click.argument(
    "folders",
    metavar="RUN_FOLDER...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
)
@click.option(
    "--out",
    type=FILE,
    default=FOLDER / "calibration.json",
    show_default="experiments/results/calibration.json",
)
def main(folders: tuple[Path, ...], out: Path) -> None:
    """Calibrate the pruned checkpoints of RUN_FOLDER... in many ways, and measure what comes out.

    What --out has already, of the same weights and versions, is not measured again: an interrupted run
    goes on.
    """
    command = shlex.join(["python", "-m", "experiments.calibration", *map(str, folders)])
    results = Results(**made_here(command), seconds=0, rows=[])
    known: dict[tuple[str, Variant], Row] = {}
    if out.exists():
        earlier = Results.model_validate_json(out.read_text(encoding="utf-8"))
        if earlier.versions == results.versions:
            results.seconds = earlier.seconds
            known = {(row.weights_sha256, row.variant): row for row in earlier.rows}
    console, before = Console(), time.monotonic() - results.seconds
    with Progress(console=console) as progress:
        task = progress.add_task("calibrating", total=len(folders) * len(VARIANTS))
        for folder in folders:
            try:
                sha256 = read_card(_checkpoint(folder)).weights_sha256
                made = measure(folder, [variant for variant in VARIANTS if (sha256, variant) not in known])
                for variant in VARIANTS:
                    results.rows.append(known.get((sha256, variant)) or next(made))
                    results.seconds = round(time.monotonic() - before, 1)
                    results.write(out)
                    progress.advance(task)
            except (CheckpointError, DatasetError) as error:
                raise click.ClickException(str(error)) from error
    console.print(table(results), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
