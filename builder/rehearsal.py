"""How long building an engine will take, foretold before its network is trained, from two small builds."""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import Progress

from builder.compile.packages import build_package
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate
from builder.kit import Student
from builder.options import BuildOptions
from builder.prepare.export import importing
from builder.prepare.options import PrepareOptions
from models.bars import bars_in
from models.datasets import DataSplit, ImageSet
from models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

_SHARES: Final = (1 / 32, 1 / 8)  # of the images


def foretell_build(network: nn.Module, spec: Preprocessing, data: DataSplit) -> float:
    """Seconds that `build` takes for the INT8 engine of a network that was trained here.

    A part of them is the same for all builds, and another grows with the images that calibrate and judge.
    Two builds with some of the images tell both. What TensorRT's compiler takes is not among them, nor are
    further ways to INT8, should the first one lose too much.

    Args:
        network: of the same form; its weights do not matter.
        spec: how it takes images.
        data: that it is trained on.

    Raises:
        ExportError: no engine can be made of it.
    """
    with importing("building an engine", "leave out --build"):
        from builder.prepare import preparation  # noqa: F401 - so that no build's time is that of imports
    (few, some), (less, more) = _SHARES, [_timed(network, spec, data, share) for share in _SHARES]
    return less + max(more - less, 0) * (1 - few) / (some - few)


def _timed(network: nn.Module, spec: Preprocessing, data: DataSplit, share: float) -> float:
    """Seconds of a build that is thrown away, with a share of the images that a real one takes."""
    from builder.prepare.export import export_onnx
    from builder.prepare.preparation import Subject, prepare
    from models.evaluation import predict_logits

    options = PrepareOptions()
    positions = max(options.verification_images // len(data.validation), 1)
    validation = _some(data.validation, share, options.verification_images)
    few = replace(data, train=_some(data.train, share, options.calibration_images), validation=validation)
    options = options.model_copy(update={"verification_images": positions * len(validation)})
    subject = Subject(
        path=Path("rehearsal"),
        student=Student(
            name="rehearsal",
            labels=list(data.labels),
            preprocessing=spec,
            checkpoint_sha256=None,
            parameters=None,
            macs=None,
        ),
        data=few,
        export=lambda master: export_onnx(network, spec, master),
        reference=lambda pixels: predict_logits(network, pixels, spec).numpy(),
    )
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="trimrt-") as folder,
        bars_in(Progress(console=Console(file=io.StringIO()))),
    ):
        workspace = Path(folder) / "graphs"
        workspace.mkdir()
        build_package(
            prepare(subject, workspace, options, lambda _: None),
            open_target("openvino"),
            "int8",
            Path(folder),
            batch=BuildOptions().batch,
            gate=Gate(max_drop=1, min_agreement=0),
            command="trimrt build",
            report=lambda _: None,
        )
    return time.perf_counter() - began


def _some(images: ImageSet, share: float, most: int) -> ImageSet:
    count = max(round(share * min(len(images), most)), 1)
    return images.spread(count, f"{images.name}-rehearsed")
