"""Checkpoint to graphs: export, convert, calibrate. This half of the builder needs torch and ModelOpt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from builder.export import export_onnx
from builder.fp16 import convert_to_fp16
from builder.int8 import METHODS, Method, convert_to_int8
from builder.int8_dynamic import convert_to_dynamic_int8
from builder.kit import KIT_NAME, VERIFICATION_NAME, Graph, KitManifest, Student, write_verification
from builder.legality import require_legal
from builder.targets import Report, Rest
from builder.verification import VerificationSet
from models.card import Card
from models.checkpoint import load_checkpoint
from models.datasets import DatasetError, DataSplit, ImageSet, open_dataset
from models.evaluation import predict_logits
from models.files import replace_folder
from models.preprocessing import Pixels
from server.manifest import Calibration, Precision, sha256_of


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is prepared.

    Attributes:
        data: data set that calibration and verification images are taken from; None: the card's.
        calibration_images: training images to calibrate INT8 with, at most.
        verification_images: validation images to judge engines by, at most.
        methods: ways to find activation ranges, the preferred one first.
        seed: of the choice of images.
    """

    data: str | None = None
    calibration_images: int = 512
    verification_images: int = 1024
    methods: Sequence[Method] = METHODS
    seed: int = 0


@dataclass(frozen=True)
class Preparation:
    """A checkpoint whose graphs are made when they are asked for.

    Attributes:
        path: the checkpoint.
        student: the network.
        verification: held-out images with PyTorch's logits.
        workspace: folder that the graphs are written to.
        master: the FP32 graph in it.
        export_difference: largest logit difference of `master` and PyTorch.
        calibration: the training images to calibrate with.
    """

    path: Path
    student: Student
    verification: VerificationSet
    workspace: Path
    master: Path
    export_difference: float
    calibration: ImageSet
    settings: Settings
    report: Report

    def graphs(self, precision: Precision, rest: Rest) -> Iterator[tuple[Graph, Path]]:
        """Convert the master graph; for static INT8, once for each calibration method."""
        path = self.workspace / f"{precision}.onnx"
        if precision == "fp32":
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
            for method in self.settings.methods:
                path = self.workspace / f"int8-{method}-{rest}.onnx"
                self.report(f"calibrating INT8 ({method}) with {len(self.calibration)} training images")
                convert_to_int8(self.master, path, self._calibration_pixels, method=method, rest=rest)
                calibration = Calibration(
                    method=method,
                    images=len(self.calibration),
                    images_sha256=self.calibration.sha256,
                    seed=self.settings.seed,
                )
                yield self._graph(path, precision, rest, calibration), path

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
            weights_bytes=sum(
                onnx.numpy_helper.to_array(weight).nbytes for weight in model.graph.initializer
            ),
        )


def prepare_checkpoint(path: Path, workspace: Path, settings: Settings, report: Report) -> Preparation:
    """Load a checkpoint and its data, export the master graph, and compute the reference logits.

    Args:
        path: a checkpoint's folder.
        workspace: an empty folder for the graphs.
        settings: where images come from, and how many.
        report: takes lines of progress.

    Raises:
        CheckpointError: no valid checkpoint there.
        DatasetError: its data cannot be found, or is not what it was trained on.
        ExportError: the network cannot be exported faithfully.
    """
    report("loading the checkpoint")
    network, card = load_checkpoint(path)
    report("finding calibration and validation images")
    split = _open_data(card, settings.data)
    calibration = _sample(split.train, settings.calibration_images, settings.seed)
    validation = _sample(split.validation, settings.verification_images, settings.seed)
    pixels = validation.load_pixels(card.preprocessing)
    report("exporting to ONNX")
    master = workspace / "fp32.onnx"
    difference = export_onnx(network, card.preprocessing, master)
    report("computing the FP32 reference")
    logits = predict_logits(network, pixels, card.preprocessing).numpy()
    return Preparation(
        path=path,
        student=Student(
            name=card.name,
            labels=card.labels,
            preprocessing=card.preprocessing,
            checkpoint_sha256=card.weights_sha256,
            parameters=card.metrics.parameters,
            macs=card.metrics.macs,
        ),
        verification=VerificationSet(validation.name, pixels, validation.targets, logits),
        workspace=workspace,
        master=master,
        export_difference=difference,
        calibration=calibration,
        settings=settings,
        report=report,
    )


def write_kit(
    preparation: Preparation,
    folder: Path,
    precisions: Sequence[Precision],
    rests: Sequence[Rest],
    command: str,
) -> KitManifest:
    """Write a build kit with every graph that compiling those precisions may need.

    Args:
        preparation: where the graphs come from.
        folder: the kit's; an older kit there is replaced in one step.
        precisions: what can be built from the kit.
        rests: precisions of what INT8 graphs do not quantise, one for each kind of target.
        command: the command that makes this kit.
    """
    graphs: dict[str, Graph] = {}
    with replace_folder(folder) as new:
        for precision in precisions:
            for rest in rests if precision == "int8" else rests[:1]:
                for graph, path in preparation.graphs(precision, rest):
                    shutil.copyfile(path, new / graph.file)
                    graphs[graph.file] = graph
        write_verification(new / VERIFICATION_NAME, preparation.verification)
        manifest = KitManifest(
            builder_version=version("trimrt"),
            student=preparation.student,
            graphs=list(graphs.values()),
            verification_sha256=sha256_of(new / VERIFICATION_NAME),
            verification_images=preparation.verification.name,
            export_difference=preparation.export_difference,
            command=command,
        )
        (new / KIT_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _open_data(card: Card, data: str | None) -> DataSplit:
    split = open_dataset(data or card.dataset.source, fold=card.dataset.fold or 0)
    if list(split.labels) != card.labels:
        raise DatasetError(
            f"{split.source} has other classes than {card.name} was trained on; "
            "name the right data with --data"
        )
    if data is None and split.sha256 != card.dataset.sha256:
        raise DatasetError(
            f"{split.source} is not what {card.name} was trained on: images were added, removed or changed, "
            "so its validation images may be ones that the network has learned. Restore it, or name other "
            "data with --data"
        )
    return split


def _sample(images: ImageSet, count: int, seed: int) -> ImageSet:
    """At most `count` of the images, chosen by `seed`, in the set's own order."""
    if len(images) <= count:
        return images
    chosen = np.random.default_rng(seed).choice(len(images), count, replace=False)
    return images.subset(np.sort(chosen), f"{images.name}-{count}")
