"""What a plan is made of: the layers that TensorRT lists of it; each may be several of the graph's."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from models.errors import faults
from runtime.manifest import EngineError
from runtime.reading import TEXT_BYTES
from runtime.signatures import ANYONE, SignatureError, Trust

LAYERS_NAME: Final = "layers.json"
# How the list begins, in the builder's verbose messages and in the engine inspector's.
LIST_BEGINS: Final = ("Layers:\n", "Engine Layer Information:\n")

_TENSORS: Final = r"\[(?:\]|.*?\}\])"  # `[]`, or `[ {...}, {...}]`
_LAYER: Final = re.compile(
    rf"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>{_TENSORS})"
    rf"(?:, Constants: {_TENSORS})?, Outputs: (?P<outputs>{_TENSORS})"
    r"(?:.*?, TacticName: (?P<kernel>[^,]*))?(?:.*?, Metadata: (?P<origin>.*))?.*$",
    re.MULTILINE,
)
_TENSOR: Final = re.compile(r"Dimensions: \[([-\d, ]*)\].*?Datatype: (\w+)")


class PlanTensor(BaseModel):
    """What a layer reads or writes."""

    model_config = ConfigDict(frozen=True)

    dtype: str = Field(description="as TensorRT calls it: `Half`, `Int8`, `Float`, `UInt8`")
    shape: list[int]


class PlanLayer(BaseModel):
    """One layer of an engine."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str = Field(description="TensorRT's own word, e.g. `correlation` for a convolution")
    kernel: str = Field(description="what computes it; may be empty")
    inputs: list[PlanTensor]
    outputs: list[PlanTensor]
    graph_layers: list[str] = Field(description="those of the ONNX graph that it computes")


_LIST: Final = TypeAdapter(list[PlanLayer])


def parse_layers(text: str) -> list[PlanLayer]:
    """The layers in TensorRT's list of them; none where it says no more than their names."""
    return [
        PlanLayer(
            name=found["name"],
            kind=found["kind"],
            kernel=found["kernel"] or "",
            inputs=_tensors(found["inputs"]),
            outputs=_tensors(found["outputs"]),
            graph_layers=re.findall(r"\[ONNX Layer: ([^\]]+)\]", found["origin"] or ""),
        )
        for found in _LAYER.finditer(text)
    ]


def summarise(layers: list[PlanLayer]) -> str:
    """How many there are, what types they write, and how many compute several of the graph's layers."""
    written = Counter(tensor.dtype for layer in layers for tensor in layer.outputs[:1])
    types = ", ".join(f"{count} write {dtype}" for dtype, count in written.most_common())
    fused = sum(len(layer.graph_layers) > 1 for layer in layers)
    return f"{len(layers)} layers: {types}; {fused} compute several of the graph's"


def _tensors(text: str) -> list[PlanTensor]:
    return [
        PlanTensor(dtype=dtype, shape=[int(size) for size in sizes.split(",") if size.strip()])
        for sizes, dtype in _TENSOR.findall(text)
    ]


def write_layers(folder: Path, layers: list[PlanLayer]) -> None:
    """Write `layers.json` into a package's folder."""
    (folder / LAYERS_NAME).write_bytes(_LIST.dump_json(layers, indent=2) + b"\n")


def read_layers(folder: Path, trust: Trust = ANYONE) -> list[PlanLayer]:
    """The layers of the engine package in `folder`.

    Args:
        folder: the package's.
        trust: whose packages are used.

    Raises:
        EngineError: it says nothing of them, or nothing that can be read or trusted.
    """
    try:
        return _LIST.validate_json(trust.read(folder / LAYERS_NAME, TEXT_BYTES))
    except FileNotFoundError:
        raise EngineError(
            f"{folder} has no {LAYERS_NAME}: packages for TensorRT do, unless built with --profiling none"
        ) from None
    except OSError as error:
        raise EngineError(f"{folder / LAYERS_NAME} cannot be read: {error.strerror}") from error
    except SignatureError as error:
        raise EngineError(str(error)) from error
    except ValidationError as error:
        raise EngineError(f"{folder / LAYERS_NAME} is no list of layers: {faults(error)}") from error
