"""What the protocol means here, whatever carries it.

A model is an engine. Its one input takes either pixels (`UINT8`, the engine's own shape) or encoded
image files (`BYTES`, one element an image), which are decoded as for `/predict`. Its outputs are
`logits` and `probabilities`, or, with the classification extension, `score:index:label` strings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.jobs import Result
from server.problems import Problem
from server.registry import Registry
from server.scheduler import Scheduler
from server.v2.tensors import Floats, InputTensor, OutputTensor, unpack_bytes

EXTENSIONS: Final = ["binary_tensor_data", "classification"]
OUTPUTS: Final = ("logits", "probabilities")
_PLATFORMS: Final = {
    "tensorrt": "tensorrt_plan",
    "tensorrt-rtx": "tensorrt_rtx_plan",
    "openvino": "openvino_blob",
}


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output asked for; `classification` is how many classes, 0 for all the numbers."""

    name: str
    classification: int = 0


ALL_OUTPUTS: Final = tuple(RequestedOutput(name) for name in OUTPUTS)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference request; `id` is to be repeated in the answer, unless empty."""

    id: str
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput]

    @property
    def top(self) -> int:
        """How many classes of each image are to be ranked."""
        return max((output.classification for output in self.outputs), default=0)


def find_model(registry: Registry, name: str, version: str = "") -> Scheduler:
    """The loaded engine of that name and, unless empty, version.

    Raises:
        Problem: `engine-not-found`.
    """
    scheduler = registry.get(name)
    loaded = scheduler.engine.manifest.version
    if version not in ("", loaded):
        raise Problem("engine-not-found", f"version {version} of {name} is not loaded; version {loaded} is")
    return scheduler


def model_metadata(manifest: Manifest) -> dict[str, Any]:
    """The protocol's model metadata."""
    return {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": _PLATFORMS[manifest.backend],
        "inputs": [{"name": manifest.input.name, "datatype": "UINT8", "shape": list(_input_shape(manifest))}],
        "outputs": [
            {"name": name, "datatype": "FP32", "shape": [-1, len(manifest.labels)]} for name in OUTPUTS
        ],
    }


def _input_shape(manifest: Manifest) -> tuple[int, int, int, int]:
    return (-1, manifest.preprocessing.height, manifest.preprocessing.width, 3)


def images_of(request: InferRequest, manifest: Manifest) -> Sequence[bytes | Pixels]:
    """The request's images, encoded or as pixels, once it is sure that the outputs asked for exist.

    Raises:
        Problem: `malformed-request` or `invalid-parameter`.
    """
    _check_outputs(request, len(manifest.labels))
    if len(request.inputs) != 1 or request.inputs[0].name != manifest.input.name:
        names = ", ".join(repr(tensor.name) for tensor in request.inputs) or "none"
        raise Problem(
            "invalid-parameter", f"the model has one input, {manifest.input.name!r}; the request has {names}"
        )
    tensor = request.inputs[0]
    images: Sequence[bytes | Pixels]
    if tensor.datatype == "BYTES":
        images = _encoded(tensor)
    elif tensor.datatype == "UINT8":
        images = _pixels(tensor, _input_shape(manifest)[1:])
    else:
        raise Problem(
            "invalid-parameter", f"the input takes UINT8 pixels or BYTES images, not {tensor.datatype}"
        )
    if not images:
        raise Problem("invalid-parameter", "the input has no images")
    return images


def _encoded(tensor: InputTensor) -> list[bytes]:
    data = tensor.data
    elements = (
        unpack_bytes(data) if isinstance(data, bytes | memoryview) else [bytes(element) for element in data]
    )
    if math.prod(tensor.shape) != len(elements):
        raise Problem("malformed-request", f"shape {list(tensor.shape)}, but {len(elements)} elements")
    return elements


def _pixels(tensor: InputTensor, shape: tuple[int, int, int]) -> list[Pixels]:
    data = tensor.data
    pixels = (
        np.frombuffer(data, np.uint8) if isinstance(data, bytes | memoryview) else np.asarray(data, np.uint8)
    )
    if len(tensor.shape) != 4 or tuple(tensor.shape[1:]) != shape or tensor.shape[0] < 0:
        raise Problem("invalid-parameter", f"the input's shape is {[-1, *shape]}, not {list(tensor.shape)}")
    if pixels.size != math.prod(tensor.shape):
        raise Problem("malformed-request", f"shape {list(tensor.shape)}, but {pixels.size} elements")
    return list(pixels.reshape(tensor.shape))


def _check_outputs(request: InferRequest, classes: int) -> None:
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise Problem("invalid-parameter", f"no output {output.name!r}; there are {', '.join(OUTPUTS)}")
        if not 0 <= output.classification <= classes:
            raise Problem(
                "invalid-parameter", f"classification is {output.classification}, of {classes} classes"
            )


def outputs_of(request: InferRequest, results: Sequence[Result], labels: Sequence[str]) -> list[OutputTensor]:
    """The tensors that the request asked for."""
    columns: Mapping[str, Floats] = {
        "logits": np.stack([result.logits for result in results]),
        "probabilities": np.stack([result.probabilities for result in results]),
    }
    return [
        OutputTensor(
            output.name,
            _classes(columns[output.name], results, labels, output.classification)
            if output.classification
            else columns[output.name],
        )
        for output in request.outputs
    ]


def _classes(
    scores: Floats, results: Sequence[Result], labels: Sequence[str], count: int
) -> list[list[bytes]]:
    return [
        [f"{row[index]:f}:{index}:{labels[index]}".encode() for index in result.order[:count].tolist()]
        for row, result in zip(scores, results, strict=True)
    ]
