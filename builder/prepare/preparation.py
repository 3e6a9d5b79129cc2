"""Checkpoint to graphs: export, convert, calibrate."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from builder.comparison import Comparison
from builder.kit import (
    KIT_NAME,
    LEFT_OUT,
    VERIFICATION_NAME,
    Graph,
    KitError,
    KitManifest,
    Report,
    Rest,
    Student,
    VerificationSet,
    write_verification,
)
from builder.prepare import qat
from builder.prepare.export import ExportError, export_onnx, require_same
from builder.prepare.fp16 import convert_to_fp16
from builder.prepare.int8 import convert_to_int8
from builder.prepare.int8_dynamic import convert_to_dynamic_int8
from builder.prepare.ladder import Candidate, Ladder
from builder.prepare.legality import require_legal
from builder.prepare.mac_share import count_weights_bytes, int8_share
from builder.prepare.options import PrepareOptions
from builder.prepare.placement import leave_out
from builder.prepare.qdq import exact_logits
from builder.prepare.sensitivity import LayerCost
from builder.prepare.sparsity import count_sparse_layers
from models.card import Card
from models.checkpoint import load_checkpoint
from models.datasets import (
    DataSplit,
    ImageSet,
    OnDamaged,
    open_dataset,
    reopen_dataset,
    require_data_of,
)
from models.evaluation import predict_logits
from models.files import replace_folder
from models.preprocessing import Pixels
from models.recipe import Augmentation, Training
from models.training import Images
from runtime.manifest import Calibration, CalibrationMethod, FineTuning, LeftOut, Precision, sha256_of

if TYPE_CHECKING:
    import onnx
    from torch import nn

_EXPORT_IMAGES: Final = 48  # that the exported graph is held against the network with

# Shifts by at most one pixel, the identity first.
_SHIFTS: Final = sorted(
    itertools.product((-1, 0, 1), repeat=2), key=lambda shift: (np.abs(shift).sum(), shift)
)


@dataclass(frozen=True)
class Subject:
    """What is prepared: a network, wherever it comes from.

    Attributes:
        path: what the user named.
        student: what a kit says of it.
        data: training images to calibrate with, validation images to judge by.
        export: writes the master graph to a file.
        reference: the FP32 logits of uint8 NHWC pixels, shape (N, classes).
        network: to fine-tune; None where there is only a graph.
        augmentation: how its training images are varied.
        classes: the network's class for each of the data's, shape (folders,); None: they are the same.
        judge: raises unless the network, given validation logits and classes, can be right about the images;
            None for networks that were trained here.
        notes: what was found out about it, for the user.
    """

    path: Path
    student: Student
    data: DataSplit
    export: Callable[[Path], object]
    reference: Callable[[Pixels], NDArray[np.float32]]
    network: nn.Module | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    classes: NDArray[np.int64] | None = None
    judge: Callable[[NDArray[np.float32], NDArray[np.int64]], None] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Preparation:
    """A network whose graphs are made on demand.

    Attributes:
        subject: the network and its data.
        verification: held-out images with PyTorch's logits.
        workspace: folder that the graphs are written to.
        master: the FP32 graph in it.
        export_difference: largest logit difference of `master` and the network, on the user's images.
        calibration: the training images to calibrate with.
        progress: running; shows trainings.
        ranked: takes what quantising each layer costs, if that has to be known.
    """

    subject: Subject
    verification: VerificationSet
    workspace: Path
    master: Path
    export_difference: float
    calibration: ImageSet
    options: PrepareOptions
    report: Report
    progress: Progress
    ranked: Callable[[Sequence[LayerCost]], None]

    @property
    def path(self) -> Path:
        """The checkpoint, or what else the user named."""
        return self.subject.path

    @property
    def student(self) -> Student:
        """What a kit says of the network."""
        return self.subject.student

    def graphs(
        self, precision: Precision, rest: Rest, left_out: LeftOut | None = None
    ) -> Iterator[tuple[Graph, Path]]:
        """Convert the master graph; for static INT8, in every way that the options allow."""
        path = self.workspace / f"{precision}.onnx"
        if left_out is not None:
            for graph, whole in self.graphs(precision, rest):
                yield self._without(left_out, graph, whole)
        elif precision == "fp32":
            yield self._graph(self.master, precision, "fp32"), self.master
        elif precision == "fp16":
            self.report("converting to FP16")
            convert_to_fp16(self.master, path, self._calibration_pixels[:8])
            yield self._graph(path, precision, "fp16"), path
        elif precision == "int8-dynamic":
            self.report("quantising weights")
            convert_to_dynamic_int8(self.master, path)
            yield self._graph(path, precision, "fp32"), path
        else:
            for candidate in self._ladder.candidates():
                yield self._int8(candidate, rest)
            if self.options.training is not None:
                yield self._fine_tuned(self.options.training, rest)

    @cached_property
    def _ladder(self) -> Ladder:
        return Ladder(
            self.master, self._calibration_pixels, self.options, self._judge, self.report, self.ranked
        )

    def _judge(self, model: onnx.ModelProto) -> Comparison:
        """The graph beside FP32, on the verification images, its sums exact."""
        return self.verification.compare(
            exact_logits(model, self.verification.pixels), self.student.activation
        )

    def _int8(self, candidate: Candidate, rest: Rest) -> tuple[Graph, Path]:
        """A candidate with that precision between its quantised layers."""
        path = candidate.path
        if rest == "fp16":
            path = path.with_name(path.name.replace("fp32", "fp16"))
        if not path.exists():
            self._convert_rest(candidate, path)
        calibration = self._calibration(candidate.method).model_copy(
            update={
                "changes": list(candidate.changes),
                "higher_precision_layers": list(candidate.kept),
            }
        )
        graph = self._graph(path, "int8", rest, calibration)
        return graph.model_copy(update={"exact": candidate.exact, "seconds": candidate.seconds}), path

    def _convert_rest(self, candidate: Candidate, path: Path) -> None:
        """Write a candidate with FP16 between its quantised layers."""
        if candidate.method != "mse" and not candidate.kept:
            # ModelOpt leaves some layers as they are that TensorRT has no INT8 kernel for.
            convert_to_int8(self.master, path, self._calibration_pixels, method=candidate.method, rest="fp16")
        else:
            qat.convert_rest_to_fp16(candidate.path, path)

    def _without(self, part: LeftOut, whole: Graph, whole_path: Path) -> tuple[Graph, Path]:
        """An INT8 graph without Q and DQ in that part.

        Raises:
            KitError: it has none there.
        """
        import onnx

        model = leave_out(onnx.load(str(whole_path)), part)
        if model is None or whole.calibration is None:
            raise KitError(f"there is no {part} in INT8 that could be left out")
        path = whole_path.with_name(f"{whole_path.stem}-without-{part.replace(' ', '-')}.onnx")
        self.report(f"judging INT8 without the {part} by exact sums")
        onnx.save(model, str(path))
        calibration = whole.calibration.model_copy(update={"left_out": part})
        graph = self._graph(path, "int8", whole.rest, calibration)
        return graph.model_copy(update={"exact": self._judge(model), "seconds": whole.seconds}), path

    def _fine_tuned(self, training: Training, rest: Rest) -> tuple[Graph, Path]:
        """The graph of the network fine-tuned for INT8."""
        train = self.subject.data.train
        master = self.workspace / "int8-qat-fp32.onnx"
        if not master.exists():
            self._fine_tune(training, train, master)
        path = self.workspace / f"int8-qat-{rest}.onnx"
        if not path.exists():
            qat.convert_rest_to_fp16(master, path)
        tuning = FineTuning(
            epochs=training.epochs,
            images=len(train),
            images_sha256=train.sha256,
            learning_rate=training.learning_rate,
        )
        calibration = self._calibration("qat").model_copy(update={"fine_tuning": tuning})
        return self._graph(path, "int8", rest, calibration), path

    def _fine_tune(self, training: Training, train: ImageSet, path: Path) -> None:
        subject, spec = self.subject, self.student.preprocessing
        assert subject.network is not None, "prepare() has seen to that"
        self.report(f"fine-tuning for INT8 with {len(train)} training images")
        quantised = qat.fine_tune(
            subject.network,
            self._calibration_pixels,
            Images(train.load_pixels(spec), train.targets),
            spec,
            training,
            subject.augmentation,
            self.options.seed,
            self.progress,
        )
        qat.export_quantised(quantised, spec, path, self.student.activation)

    def _calibration(self, method: CalibrationMethod) -> Calibration:
        return Calibration(
            method=method,
            images=len(self.calibration),
            images_sha256=self.calibration.sha256,
            seed=self.options.seed,
        )

    @cached_property
    def _calibration_pixels(self) -> Pixels:
        return self.calibration.load_pixels(self.student.preprocessing)

    def _graph(
        self, path: Path, precision: Precision, rest: Rest, calibration: Calibration | None = None
    ) -> Graph:
        import onnx

        model = onnx.load(str(path))
        require_legal(model)
        return Graph(
            file=path.name,
            sha256=sha256_of(path),
            precision=precision,
            rest=rest,
            calibration=calibration,
            weights_bytes=count_weights_bytes(model),
            int8_share=int8_share(model) if precision.startswith("int8") else None,
            sparsity=count_sparse_layers(model),
        )


def open_checkpoint(
    path: Path, data: str | None, name: str | None = None, *, on_damaged: OnDamaged = "stop"
) -> Subject:
    """The checkpoint in a folder, with the data it was trained on or the data named.

    Args:
        path: the folder.
        data: a data set; None: what it was trained on.
        name: of the student; None: the card's.
        on_damaged: what to do about images of `data` that cannot be read.

    Raises:
        CheckpointError: no valid checkpoint there.
        DatasetError: its data cannot be found, or differs from the training data.
    """
    network, card = load_checkpoint(path)
    spec = card.preprocessing
    return Subject(
        path=path,
        student=Student(
            name=name or card.name,
            source=str(path.resolve()),
            labels=card.labels,
            preprocessing=spec,
            checkpoint_sha256=card.weights_sha256,
            parameters=card.metrics.parameters,
            macs=card.metrics.macs,
            promise=card.promise,
        ),
        data=_open_data(card, data, on_damaged),
        export=lambda master: export_onnx(network, spec, master),
        reference=lambda pixels: predict_logits(network, pixels, spec).numpy(),
        network=network,
        augmentation=Augmentation.model_validate(card.recipe.get("augmentation", {})),
    )


def prepare(
    subject: Subject,
    workspace: Path,
    options: PrepareOptions,
    report: Report,
    progress: Progress | None = None,
    ranked: Callable[[Sequence[LayerCost]], None] = lambda _: None,
) -> Preparation:
    """Export the master graph, and compute the reference logits.

    Args:
        subject: the network and its data.
        workspace: an empty folder for the graphs.
        options: how the graphs are made.
        report: takes lines of progress.
        progress: running, for trainings; None: they are not shown.
        ranked: takes what quantising each layer costs, if that has to be known.

    Raises:
        DatasetError: an image cannot be read.
        ExportError: the network cannot be exported faithfully, or not be fine-tuned where that is asked for.
    """
    student, data = subject.student, subject.data
    if options.qat:
        if subject.network is None:
            raise ExportError(
                f"{subject.path} is a graph, and --qat needs a network that can be trained: "
                "a checkpoint, torchvision:NAME or timm:NAME"
            )
        qat.require_modelopt()
    report("loading calibration and validation images")
    calibration = _sample(data.train, options.calibration_images, options.seed)
    validation = _sample(data.validation, options.verification_images, options.seed)
    positions = min(options.verification_images // len(validation), len(_SHIFTS))
    pixels = _in_positions(validation.load_pixels(student.preprocessing), positions)
    report("exporting to ONNX")
    master = workspace / "fp32.onnx"
    subject.export(master)
    report("computing the FP32 reference")
    logits, targets = subject.reference(pixels), validation.targets
    some = np.linspace(0, len(validation) - 1, min(len(validation), _EXPORT_IMAGES)).astype(np.int64)
    difference = require_same(master, pixels[some], logits[some])
    if subject.classes is not None:
        targets = subject.classes[targets]
    originals = len(validation)
    if subject.judge is not None:
        subject.judge(logits[:originals], targets)
    return Preparation(
        subject=subject,
        verification=VerificationSet(
            name=validation.name if positions == 1 else f"{validation.name} in {positions} positions",
            pixels=pixels,
            targets=np.tile(targets, positions),
            logits=logits,
            originals=originals,
        ),
        workspace=workspace,
        master=master,
        export_difference=difference,
        calibration=calibration,
        options=options,
        report=report,
        progress=progress or Progress(disable=True),
        ranked=ranked,
    )


def write_kit(
    preparation: Preparation,
    folder: Path,
    precisions: Sequence[Precision],
    rests: Sequence[Rest],
    command: str,
    passes: Callable[[Graph], bool] = lambda _: True,
) -> KitManifest:
    """Write a build kit with every graph that compiling those precisions may need.

    Args:
        preparation: where the graphs come from.
        folder: the kit's; an older kit there is replaced in one step.
        precisions: what can be built from the kit.
        rests: precisions of what INT8 graphs do not quantise, one for each kind of target.
        command: the command that makes this kit.
        passes: whether a graph is likely to pass the accuracy gate. Of the ways to static INT8, the kit gets
            all until one does, and the next that does: kernels of some processors are less exact. If the
            network is fine-tuned, it gets all. Of those that leave more in floating point, one that does.
    """
    graphs: dict[str, Graph] = {}

    def add(found: Iterator[tuple[Graph, Path]], most: float) -> None:
        passed = 0
        for graph, path in found:
            shutil.copyfile(path, new / graph.file)
            graphs[graph.file] = graph
            passed += passes(graph)
            if passed == most:
                break

    with replace_folder(folder) as new:
        for precision in precisions:
            for rest in rests if precision == "int8" else rests[:1]:
                add(preparation.graphs(precision, rest), math.inf if preparation.options.qat else 2)
                for part in LEFT_OUT[rest] if precision == "int8" else ():
                    with suppress(KitError):  # the network has no such part
                        add(preparation.graphs(precision, rest, part), 1)
        write_verification(new / VERIFICATION_NAME, preparation.verification)
        manifest = KitManifest(
            builder_version=version("trimrt"),
            student=preparation.student,
            graphs=list(graphs.values()),
            verification_sha256=sha256_of(new / VERIFICATION_NAME),
            verification_images=preparation.verification.name,
            verification_originals=preparation.verification.originals,
            export_difference=preparation.export_difference,
            command=command,
        )
        (new / KIT_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _open_data(card: Card, data: str | None, on_damaged: OnDamaged) -> DataSplit:
    if data is None:
        split = replace(reopen_dataset(card.dataset), summary=())  # the training has told it
    else:
        split = open_dataset(data, fold=card.dataset.fold or 0, on_damaged=on_damaged)
    require_data_of(card, split, named=data is not None)
    return split


def _sample(images: ImageSet, count: int, seed: int) -> ImageSet:
    """At most `count` of the images, chosen by `seed`, in the set's own order."""
    if len(images) <= count:
        return images
    chosen = np.random.default_rng(seed).choice(len(images), count, replace=False)
    return images.subset(np.sort(chosen), f"{images.name}-{count}")


def _in_positions(pixels: Pixels, positions: int) -> Pixels:
    """Every image in the first `positions` of `_SHIFTS`, with the border repeated where the image moves away.

    The gate judges half points. Of 144 images, a single one that even FP32 is unsure about is 0.7 points, so
    a small set would refuse good engines by chance.
    """
    height, width = pixels.shape[1:3]
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return np.concatenate(
        [padded[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in _SHIFTS[:positions]]
    )
