"""Networks that are only to be timed: their weights may be random, and INT8 ranges are those of noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import onnx
from torch import nn

from builder.kit import Graph, Rest, Student
from builder.prepare.export import export_onnx, random_pixels
from builder.prepare.fp16 import convert_to_fp16
from builder.prepare.int8 import convert_to_int8
from builder.prepare.int8_dynamic import convert_to_dynamic_int8
from builder.prepare.legality import require_legal
from builder.prepare.mac_share import count_weights_bytes
from builder.prepare.sources import package_name
from models.checkpoint import load_checkpoint
from models.defaults import PHOTO_SIDE
from models.evaluation import count_macs, count_parameters
from models.networks import architecture_of, build_network
from models.preprocessing import Preprocessing
from runtime.manifest import Precision, sha256_of

_NOISE_IMAGES: Final = 8


def trained_network(checkpoint: Path) -> tuple[nn.Module, Student]:
    """The network of a checkpoint.

    Raises:
        CheckpointError: no valid checkpoint there.
    """
    network, card = load_checkpoint(checkpoint)
    return network, Student(
        name=card.name,
        source=str(checkpoint.resolve()),
        labels=card.labels,
        preprocessing=card.preprocessing,
        checkpoint_sha256=card.weights_sha256,
        parameters=card.metrics.parameters,
        macs=card.metrics.macs,
    )


def random_network(
    architecture: str, classes: int, size: int, stem: Literal["auto", "standard", "small"]
) -> tuple[nn.Module, Student]:
    """A network with random weights, none of which a compiler can leave out as zeros.

    Args:
        architecture: torchvision's name, or timm's after `timm:`.
        classes: number of outputs.
        size: side of its input, in pixels.
        stem: its first convolution; auto is that of `trimrt compress`.

    Raises:
        NetworkError: there is no such architecture.
    """
    architecture = architecture_of(architecture)
    if stem == "auto":
        stem = "small" if size < PHOTO_SIDE else "standard"
    network = without_zeros(build_network(architecture, classes, stem).eval())
    return network, Student(
        name=package_name(architecture),
        source=architecture,
        labels=[str(number) for number in range(classes)],
        preprocessing=Preprocessing(resize=size, height=size, width=size),
        checkpoint_sha256=None,
        parameters=count_parameters(network),
        macs=count_macs(network, size, size),
    )


def without_zeros(network: nn.Module) -> nn.Module:
    """The network, with ones for all scales that are zero, as a compiler would leave out what they scale."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and not module.weight.any():
            nn.init.ones_(module.weight)
    return network


def timing_graph(
    network: nn.Module, spec: Preprocessing, precision: Precision, rest: Rest, folder: Path
) -> tuple[Graph, Path]:
    """A graph that takes as long as that of the network calibrated with images.

    Args:
        network: on the CPU.
        spec: input size and normalisation.
        precision: of the graph.
        rest: precision of what an INT8 graph does not quantise.
        folder: that graphs are written to.

    Raises:
        ExportError: the network cannot be exported.
    """
    master, path = folder / "fp32.onnx", folder / f"{precision}.onnx"
    export_onnx(network, spec, master)
    noise = random_pixels(spec, _NOISE_IMAGES)
    converters: dict[Precision, Callable[[], object]] = {
        "fp32": lambda: None,
        "fp16": lambda: convert_to_fp16(master, path, noise),
        "int8": lambda: convert_to_int8(master, path, noise, method="max", rest=rest),
        "int8-dynamic": lambda: convert_to_dynamic_int8(master, path),
    }
    converters[precision]()
    model = onnx.load(str(path))
    require_legal(model)
    graph = Graph(
        file=path.name,
        sha256=sha256_of(path),
        precision=precision,
        rest=rest,
        weights_bytes=count_weights_bytes(model),
    )
    return graph, path
