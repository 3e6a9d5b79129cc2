"""From a network to engine packages: what `trimrt build` and `trimrt prepare` call, from Python too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from builder.compile.packages import Package, build_package
from builder.compile.selection import build_best
from builder.compile.targets.base import INT8_REST
from builder.compile.targets.choice import choose_backend, open_target
from builder.compile.targets.tensorrt.progress import RichListener
from builder.compile.verification import Gate, GateError
from builder.finding import LIBRARIES, find_source, is_weights
from builder.kit import Graph, GraphSource, Kit, KitError, KitManifest, is_kit, open_kit
from builder.observer import BuildObserver
from builder.options import BuildOptions
from builder.prepare.export import ExportError, importing
from builder.prepare.options import FOREIGN, PrepareOptions
from builder.rebuilding import build_command, changed_options, prepare_command
from models.card import read_card
from models.files import require_writable
from runtime.manifest import Backend, Precision

if TYPE_CHECKING:
    from builder.prepare.preparation import Preparation, Subject


DEFAULT_PRECISIONS: Final[dict[Backend, tuple[Precision, ...]]] = {
    "openvino": ("int8",),
    "tensorrt": ("int8",),
    "tensorrt-rtx": ("fp16",),
}
RTX_INT8: Final = (
    "TensorRT-RTX computes INT8 convolutions into FP32, with a kernel more for each: FP16, which it fuses, "
    "is likely faster, and for small networks smaller (docs/tensorrt.md)"
)


def build(
    source: str | Path,
    output: str | Path = "engines",
    options: BuildOptions | None = None,
    observer: BuildObserver | None = None,
) -> list[Package]:
    """Build engine packages and publish those that pass the accuracy gate.

    Args:
        source: a checkpoint's folder or name, a build kit's folder, an ONNX file, a file of weights,
            `torchvision:NAME` or `timm:NAME`. All but a kit need `pip install 'trimrt[compress]'`.
        output: folder that the packages' folders go into.
        options: what to build, and how; None: an INT8 engine for this machine.
        observer: follows the build.

    Returns:
        The published packages, in the order of the precisions.

    Raises:
        GateError: an engine failed the gate. All others are published; the message names each that is not.
        CheckpointError, DatasetError, ExportError, KitError, MissingSourceError, NetworkError: the source,
            its data or the options cannot be used.
        CompileError, EngineError: the compiler is missing or refused a graph, or an engine does not run.
        PublicationError: a package cannot be put into `output`, or would replace one of another network.
    """
    output, options, observer = Path(output), options or BuildOptions(), observer or BuildObserver()
    source = find_source(source)
    require_writable(output)
    backend, listener = options.target, RichListener(observer.progress) if observer.progress else None
    if backend == "auto":
        backend, reason = choose_backend()
        observer.chose_target(backend, reason)
    target = open_target(backend, options.tensorrt, listener)
    precisions = options.precisions or DEFAULT_PRECISIONS[backend]
    if backend == "tensorrt-rtx" and "int8" in precisions:
        observer.noted(RTX_INT8)
    packages: list[Package] = []
    refused: list[str] = []
    with _graphs(source, options, observer) as graphs:
        for precision in precisions:
            build_one = (
                partial(build_best, objective=options.objective)
                if precision == "best"
                else partial(build_package, precision=precision)
            )
            try:
                package = build_one(
                    source=graphs,
                    target=target,
                    output=output,
                    batch=options.batch,
                    gate=options.gate,
                    command=build_command(source, output, options, precision, backend),
                    report=observer.report,
                    replace=options.replace,
                )
            except GateError as error:
                refused.append(str(error))
                continue
            observer.published(package)
            if options.tensorrt.sparsity and package.sparsity is not None:
                observer.noted(str(package.sparsity))
            packages.append(package)
        if refused and {"int8", "best"} & set(precisions):
            refused += _remedies(graphs, options)
    if refused:
        raise GateError("\n".join(refused))
    return packages


def make_kit(
    source: str | Path,
    output: str | Path,
    options: PrepareOptions | None = None,
    *,
    precisions: Sequence[Precision] = get_args(Precision),
    targets: Sequence[Backend] = tuple(INT8_REST),
    observer: BuildObserver | None = None,
) -> KitManifest:
    """Write a build kit: all that `build` needs on another machine, which then needs neither torch nor onnx.

    Args:
        source: as for `build`, but no kit.
        output: the kit's folder; an older kit there is replaced.
        options: how the graphs are made.
        precisions: what can be built from the kit.
        targets: what it can be built for.
        observer: follows the preparation.

    Returns:
        What the kit says of itself.

    Raises:
        CheckpointError, DatasetError, ExportError, MissingSourceError, NetworkError: the source, its data or
            the options cannot be used.
        KitError: `output` exists and is not a kit.
    """
    output, options, observer = Path(output), options or PrepareOptions(), observer or BuildObserver()
    source = find_source(source)
    require_writable(output)
    if output.exists() and not is_kit(output):
        raise KitError(f"{output} exists and is not a build kit; choose another --output")
    rests = list(dict.fromkeys(INT8_REST[target] for target in targets))
    with _prepared(source, options, observer) as graphs:
        from builder.prepare.preparation import write_kit

        command = prepare_command(source, output, precisions, targets, options)
        return write_kit(graphs, output, precisions, rests, command, _passes)


def _passes(graph: Graph) -> bool:
    """Whether exact sums of the graph are within the usual limits, as far as is known."""
    try:
        if graph.exact is not None:
            Gate().check(graph.exact)
    except GateError:
        return False
    return True


@contextmanager
def _graphs(source: str, options: BuildOptions, observer: BuildObserver) -> Iterator[GraphSource]:
    """The build kit, or the checkpoint or model, exported."""
    if not is_kit(Path(source)):
        if options.trust.keys:
            raise KitError(f"{source} is no build kit, and only kits and engine packages are signed")
        with _prepared(source, options.prepare, observer) as graphs:
            yield graphs
        return
    if changed := changed_options(options.prepare):
        raise KitError(
            f"{source} is a build kit, whose images and calibration are fixed; leave out {', '.join(changed)}"
        )
    observer.report("checking the build kit")
    with tempfile.TemporaryDirectory(prefix="trimrt-") as copies:
        yield open_kit(Path(source), options.trust, Path(copies))


@contextmanager
def _prepared(source: str, options: PrepareOptions, observer: BuildObserver) -> Iterator[Preparation]:
    """The checkpoint or model, exported; its graphs live as long as the context."""
    if _is_checkpoint(source):
        read_card(Path(source))  # says what is wrong before seconds of importing
        for name in FOREIGN:
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise ExportError(f"{source} is a checkpoint, which says itself what --{flag} would")
    observer.report("importing")
    with importing(f"preparing {source}", "build from its kit"):
        from builder.prepare.preparation import prepare
    observer.report(f"reading {source}")
    subject = _open(source, options)
    for note in (*subject.data.summary, *subject.notes):
        observer.noted(note)
    with tempfile.TemporaryDirectory(prefix="trimrt-") as workspace:
        graphs = prepare(
            *(subject, Path(workspace), options, observer.report, observer.progress, observer.ranked_layers)
        )
        observer.exported(graphs.export_difference)
        yield graphs


def _is_checkpoint(source: str) -> bool:
    """Whether it should be a folder that `trimrt compress` wrote, as all is that is nothing else."""
    path = Path(source)
    return not (source.startswith(LIBRARIES) or path.is_file() or is_weights(path))


def _open(source: str, options: PrepareOptions) -> Subject:
    from builder.prepare.named import open_named, open_weights
    from builder.prepare.preparation import open_checkpoint
    from builder.prepare.sources import open_onnx

    path = Path(source)
    if source.startswith(LIBRARIES):
        return open_named(source, options)
    if is_weights(path):
        return open_weights(path, options)
    if path.is_file():
        if options.architecture is not None:
            raise ExportError(f"{path} is taken for ONNX, which needs no --architecture")
        return open_onnx(path, options)
    return open_checkpoint(Path(source), options.data, options.name, on_damaged=options.on_damaged)


def _remedies(source: GraphSource, options: BuildOptions) -> Iterator[str]:
    """What has not been tried to get INT8 through the gate."""
    prepare, where = options.prepare, ""
    if isinstance(source, Kit):
        where = " (of `trimrt prepare`)"
        made = [graph.calibration for graph in source.manifest.graphs if graph.calibration is not None]
        changes = {change for calibration in made for change in calibration.changes}
        prepare = PrepareOptions(
            correction="bias" in changes,
            rounding="rounded" in changes,
            sensitivity=any(calibration.higher_precision_layers for calibration in made),
            qat=any(calibration.method == "qat" for calibration in made),
        )
    yield "What is left to try:"
    if not prepare.correction:
        yield f"  --correction{where} equalises channels and corrects biases"
    if not prepare.rounding:
        yield f"  --rounding{where} rounds weights for the least error of each layer's output"
    if not prepare.sensitivity:
        yield f"  --sensitivity{where} finds the layers that INT8 hurts most, and keeps them out of it"
    if not prepare.qat and (is_weights(source.path) or not source.path.is_file()):  # ONNX cannot be trained
        yield f"  --qat{where} fine-tunes the network for INT8"
    yield f"  --calibration-images{where} and more training images, like those that will be served"
    yield (
        f"  --max-drop (now {100 * options.gate.max_drop:g} points) and --min-agreement "
        f"(now {100 * options.gate.min_agreement:g} %) say how much an engine may lose"
    )
    yield "  -p int8-dynamic finds the ranges of each image as it runs; fp16 and fp32 lose next to nothing"
