"""The networks that contenders serve, for OpenVINO.

One is slow, an INT8 ResNet18 of 1000 classes at 224x224. Its weights are random (seeded), for speed does not
depend on them; everything else is made by TrimRT's builder. `prepare` leaves in a folder:

- `resnet18-int8-openvino/` and `resnet18-fp32-openvino/`: engine packages;
- `colour-fp32-openvino/`: the package of a network that costs nothing, to see what a server costs;
- `float.onnx`: the same graph without its first nodes, taking normalised float NCHW tensors.

The other is fast: the shipped student of handwritten digits, in INT8 (`prepare_digits`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.contenders import DIGITS, REPOSITORY
from benchmarks.photos import photographs
from builder.api import build as build_engines
from builder.compile.packages import Package, build_package
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate
from builder.kit import INPUT, Graph, KitError, Report, Rest, Student, VerificationSet
from builder.options import BuildOptions
from builder.prepare.export import export_onnx
from builder.prepare.int8 import convert_to_int8
from models.preprocessing import Pixels, Preprocessing, load_pixels
from models.recipe import make_recipe
from runtime.loading import load_engine
from runtime.manifest import BatchSizes, EngineError, LeftOut, Precision, sha256_of

if TYPE_CHECKING:
    import torch

SPEC = Preprocessing(resize=256, height=224, width=224)
CLASSES = 1000
INT8 = "resnet18-int8-openvino"
FP32 = "resnet18-fp32-openvino"
NEXT_TO_NOTHING = "colour-fp32-openvino"

LABELS: Final = (10, 100, 1000, 5000, 21000)
"""Numbers of classes of networks that cost next to nothing, each named `colour-` and the number."""
PRUNED: Final = ("aligned", "report", "aggressive")  # the presets that prune differently

_BATCH = BatchSizes(min=1, opt=8, max=32)
_COMMAND = "python -m benchmarks.engine"


def _resnet18() -> torch.nn.Module:
    from torchvision.models import resnet18

    network: torch.nn.Module = resnet18(num_classes=CLASSES)
    return network


def _colour(classes: int = CLASSES) -> torch.nn.Module:
    from torch import nn

    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))


def _pruned(preset: str) -> torch.nn.Module:
    from models.pruning import Pruner

    network = _resnet18().eval()
    settings = make_recipe(preset=preset).pruning
    pruner = Pruner(network, SPEC, settings, settings.ratio)
    for _ in range(settings.steps):
        pruner.step()
    return network


NETWORKS: Final[dict[str, Callable[[], torch.nn.Module]]] = {
    "resnet18": _resnet18,
    "colour": _colour,
    **{f"colour-{classes}": partial(_colour, classes) for classes in LABELS},
    **{f"resnet18-{preset}": partial(_pruned, preset) for preset in PRUNED},
}


@dataclass(frozen=True)
class RandomNetwork:
    """A source of graphs for the builder, as a checkpoint is."""

    path: Path
    name: str

    @property
    def student(self) -> Student:
        """The network's description."""
        *_, last = self._network.parameters()  # the classifier's biases
        labels = [f"class-{index:03}" for index in range(len(last))]
        return Student(
            name=self.name,
            labels=labels,
            preprocessing=SPEC,
            checkpoint_sha256=None,
            parameters=sum(weights.numel() for weights in self._network.parameters()),
            macs=None,
        )

    @property
    def verification(self) -> VerificationSet:
        """Crops of the photographs, with the FP32 network's own labels as the truth."""
        from models.evaluation import predict_logits

        logits = predict_logits(self._network, self._pixels, SPEC).numpy()
        return VerificationSet(
            "crops of two photographs", self._pixels, logits.argmax(axis=1), logits, len(logits)
        )

    def graphs(
        self, precision: Precision, rest: Rest, left_out: LeftOut | None = None
    ) -> Iterator[tuple[Graph, Path]]:
        """One graph; its calibration images are the verification's, for nothing is learned here."""
        if left_out is not None:
            raise KitError(f"it has no graph with the {left_out} left out")
        path = self.path / f"{self.name}-{precision}.onnx"
        if precision == "int8":
            convert_to_int8(self._master, path, self._pixels, method="max", rest=rest)
        else:
            path = self._master
        yield (
            Graph(
                file=path.name,
                sha256=sha256_of(path),
                precision=precision,
                rest=rest,
                weights_bytes=path.stat().st_size,
            ),
            path,
        )

    @cached_property
    def _pixels(self) -> Pixels:
        """Crops of both photographs at several scales, shape (32, 224, 224, 3)."""
        random = np.random.default_rng(0)
        crops = []
        for photograph in photographs():
            whole = load_pixels(
                photograph, SPEC.model_copy(update={"resize": 400, "height": 400, "width": 400})
            )
            for _ in range(16):
                top, left = random.integers(0, 400 - 224, 2)
                crops.append(whole[top : top + 224, left : left + 224])
        return np.stack(crops)

    @cached_property
    def _network(self) -> torch.nn.Module:
        import torch

        torch.manual_seed(0)
        network = NETWORKS[self.name]().train()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (SPEC.mean, SPEC.std))
        images = (torch.from_numpy(self._pixels).permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.inference_mode():  # batch statistics of real images: activations as in a trained network
            for _ in range(20):
                network(images)
        return network.eval()

    @cached_property
    def _master(self) -> Path:
        path = self.path / f"{self.name}-fp32.onnx"
        export_onnx(self._network, SPEC, path)
        return path


def prepare(folder: Path, report: Report) -> Path:
    """Make the engines in `folder`, unless they are there and run here; returns `folder`."""
    packages = (folder / name for name in (INT8, FP32, NEXT_TO_NOTHING))
    if all(map(usable, packages)) and (folder / "float.onnx").is_file():
        return folder
    work = folder / "work"
    build((("colour", "fp32"), ("resnet18", "fp32")), folder, work, report)
    (package,) = build((("resnet18", "int8"),), folder, work, report)
    take_float_tensors(package.folder / "model.onnx", folder / "float.onnx")
    shutil.rmtree(work)
    return folder


def prepare_digits(folder: Path) -> Path:
    """Build the digits' engine in `folder`, unless it is there and runs here; returns its package."""
    package = folder / DIGITS
    if not usable(package):
        student = REPOSITORY / "models" / "pretrained" / "digits-resnet18"
        options = BuildOptions(precisions=("int8",), target="openvino", replace=True)
        build_engines(student, folder, options)
    return package


def build(
    networks: Sequence[tuple[str, Precision]], folder: Path, work: Path, report: Report
) -> list[Package]:
    """Build packages of `NETWORKS` in `folder`, with graphs in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    return [
        build_package(
            RandomNetwork(work, name),
            open_target("openvino"),
            precision,
            folder,
            batch=_BATCH,
            gate=Gate(max_drop=1, min_agreement=0),  # random weights have no accuracy to keep
            command=_COMMAND,
            report=report,
        )
        for name, precision in networks
    ]


def usable(package: Path) -> bool:
    """Whether the engine package is there and runs here."""
    try:
        load_engine(package).close()
    except EngineError:
        return False
    return True


def take_float_tensors(graph: Path, path: Path) -> None:
    """Write `graph` without its nodes `pre/*`: as exported by someone who normalises in Python."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(graph)
    nodes = [node for node in model.graph.node if not node.name.startswith("pre/")]
    (layout,) = (node for node in model.graph.node if node.name == "pre/layout")
    kept = [value for value in model.graph.input if value.name != INPUT]
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.input[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(weights)
    shape: list[str | int | None] = ["batch", 3, SPEC.height, SPEC.width]
    model.graph.input.extend(
        [helper.make_tensor_value_info(layout.output[0], TensorProto.FLOAT, shape), *kept]
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


if __name__ == "__main__":
    prepare(Path("build/benchmarks/engine"), print)
