"""What the protocol means here, whatever carries it.

A model is an engine. Its one input takes either pixels (`UINT8`, the engine's own shape) or encoded
image files (`BYTES`, one element an image), which are decoded as for `/predict`. Its outputs are
`logits` and `probabilities`, or, with the classification extension, `score:index:label` strings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Final, NamedTuple

import numpy as np

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.bodies import too_many_images
from server.jobs import Result
from server.problems import Problem
from server.registry import Registry
from server.scheduler import Scheduler
from server.v2.regions import Placement, Regions
from server.v2.tensors import Floats, InputTensor, OutputTensor, unpack_bytes

EXTENSIONS: Final = (
    *("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"),
    *("trace", "logging"),
)
NO_CUDA_MEMORY: Final = "CUDA's shared memory is not supported; system shared memory is"
SHARED_MEMORY: Final = "system_shared_memory"  # an extension too, where it is on
OUTPUTS: Final = ("logits", "probabilities")
MOST_TENSORS: Final = 16  # of a request; no model here has as many
MOST_DIMENSIONS: Final = 8
MOST_TEXT: Final = 1024  # characters of an id or a name
_PLATFORMS: Final = {
    "tensorrt": "tensorrt_plan",
    "tensorrt-rtx": "tensorrt_rtx_plan",
    "openvino": "openvino_blob",
}


class RequestedOutput(NamedTuple):
    """An output asked for.

    Attributes:
        name: its name.
        classification: how many classes of it; 0: all numbers.
        binary: over HTTP, whether in binary form.
        place: where in shared memory it is to go; None: into the answer.
    """

    name: str
    classification: int = 0
    binary: bool = False
    place: Placement | None = None


ALL_OUTPUTS: Final = tuple(RequestedOutput(name) for name in OUTPUTS)


class InferRequest(NamedTuple):
    """One inference request; `id` is to be repeated in the answer, unless empty."""

    id: str
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput]


def extensions(regions: Regions) -> list[str]:
    """The names of the extensions that are spoken."""
    return [*EXTENSIONS, *([SHARED_MEMORY] if regions.enabled else [])]


def top_of(outputs: Sequence[RequestedOutput]) -> int:
    """How many classes of each image are to be ranked."""
    return max((output.classification for output in outputs), default=0)


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


def images_of(request: InferRequest, manifest: Manifest, max_images: int) -> Sequence[bytes | Pixels]:
    """The request's images, encoded or as pixels, once it is sure that the outputs asked for exist.

    Raises:
        Problem: `malformed-request`, `invalid-parameter` or `too-many-images`.
    """
    _check_outputs(request, len(manifest.labels))
    if len(request.inputs) != 1 or request.inputs[0].name != manifest.input.name:
        names = ", ".join(repr(tensor.name) for tensor in request.inputs) or "none"
        raise Problem(
            "invalid-parameter", f"the model has one input, {manifest.input.name!r}; the request has {names}"
        )
    tensor = request.inputs[0]
    check_datatype(tensor.name, tensor.datatype)
    if len(tensor.shape) > MOST_DIMENSIONS or min(tensor.shape, default=0) < 0:
        raise Problem(
            "malformed-request", f"a shape has at most {MOST_DIMENSIONS} dimensions, none of them negative"
        )
    images: Sequence[bytes | Pixels]
    if tensor.datatype == "BYTES":
        images = _encoded(tensor, max_images)
    else:
        images = _pixels(tensor, _input_shape(manifest)[1:], max_images)
    if not images:
        raise Problem("invalid-parameter", "the input has no images")
    return images


def check_datatype(name: str, datatype: str) -> None:
    """Make sure that an input can have that datatype.

    Raises:
        Problem: `invalid-parameter`.
    """
    if datatype not in ("BYTES", "UINT8"):
        raise Problem(
            "invalid-parameter", f"input {name!r} takes UINT8 pixels or BYTES images, not {datatype!r}"
        )


def place_of(tensor: str, parameters: Mapping[str, Any]) -> Placement | None:
    """Where in shared memory the tensor (`input 'pixels'`, in words) is or is to go; None: it is not.

    Raises:
        Problem: `invalid-parameter`.
    """
    region = parameters.get("shared_memory_region")
    size, offset = parameters.get("shared_memory_byte_size"), parameters.get("shared_memory_offset")
    if region is None and size is None and offset is None:
        return None
    if not isinstance(region, str) or type(size) is not int or type(offset) not in (int, NoneType):
        raise Problem(
            "invalid-parameter",
            f"{tensor} in shared memory needs shared_memory_region, a text, and shared_memory_byte_size, a "
            "whole number; shared_memory_offset is one too",
        )
    return Placement(region, offset or 0, size)


def cached_images(results: Sequence[Result]) -> int:
    """How many of the answers were kept from before: a parameter of the answer, unless it is 0."""
    return sum(result.cached for result in results)


def parameters_of(place: Placement) -> dict[str, Any]:
    """The reverse of `place_of`."""
    offset = {"shared_memory_offset": place.offset} if place.offset else {}
    return {"shared_memory_region": place.region, "shared_memory_byte_size": place.size, **offset}


def _encoded(tensor: InputTensor, max_images: int) -> list[bytes]:
    data = tensor.data
    if isinstance(data, (bytes, memoryview)):
        elements = unpack_bytes(data, max_images)
    elif len(data) > max_images:
        raise too_many_images(max_images)
    else:
        elements = list(data)
    if math.prod(tensor.shape) != len(elements):
        raise Problem("malformed-request", f"shape {list(tensor.shape)}, but {len(elements)} elements")
    return elements


def _pixels(tensor: InputTensor, shape: tuple[int, int, int], max_images: int) -> list[Pixels]:
    assert isinstance(tensor.data, bytes | memoryview)
    if len(tensor.shape) != 4 or tuple(tensor.shape[1:]) != shape:
        raise Problem("invalid-parameter", f"the input's shape is {[-1, *shape]}, not {list(tensor.shape)}")
    pixels = np.frombuffer(tensor.data, np.uint8)
    if pixels.size != math.prod(tensor.shape):
        raise Problem("malformed-request", f"shape {list(tensor.shape)}, but {pixels.size} elements")
    if tensor.shape[0] > max_images:
        raise too_many_images(max_images)
    return list(pixels.reshape(tensor.shape))


def _check_outputs(request: InferRequest, classes: int) -> None:
    if len({output.name for output in request.outputs}) < len(request.outputs):
        raise Problem("invalid-parameter", f"an output is asked for twice; there are {', '.join(OUTPUTS)}")
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise Problem("invalid-parameter", f"no output {output.name!r}; there are {', '.join(OUTPUTS)}")
        if not 0 <= output.classification <= classes:
            raise Problem(
                "invalid-parameter", f"classification is {output.classification}, of {classes} classes"
            )


def outputs_of(
    asked: Sequence[RequestedOutput], results: Sequence[Result], labels: Sequence[str]
) -> list[OutputTensor]:
    """The tensors that the request asked for, wherever they are to go."""
    tensors = []
    for output in asked:
        rows = [getattr(result, output.name) for result in results]
        classes = output.classification
        tensors.append(
            OutputTensor(output.name, _classes(rows, results, labels, classes) if classes else np.array(rows))
        )
    return tensors


def _classes(
    scores: Sequence[Floats], results: Sequence[Result], labels: Sequence[str], count: int
) -> list[list[str]]:
    rows = []
    for row, result in zip(scores, results, strict=True):
        score = row.item  # Python's numbers are formatted faster than NumPy's
        order = result.order[:count].tolist()
        rows.append([f"{score(index):f}:{index}:{labels[index]}" for index in order])
    return rows
