"""An ONNX graph's nodes and constants, read and replaced without the onnx package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.protobuf import encode, fields, numbers, signed

# Field numbers of onnx.proto.
_MODEL_GRAPH: Final = 7
_GRAPH_NODE, _GRAPH_CONSTANT, _GRAPH_OUTPUT, _GRAPH_SHAPES = 1, 5, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_NUMBER, _ATTRIBUTE_NUMBERS = 1, 3, 8
_TENSOR_SIZES, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_BYTES = 1, 2, 8, 9
_TENSOR_FLOATS, _TENSOR_INT32, _TENSOR_INT64 = 4, 5, 7
_VALUE_NAME: Final = 1

_DTYPES: Final[dict[int, Any]] = {
    **{1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_},
    **{10: np.float16, 11: np.float64},
}


@dataclass(frozen=True)
class Node:
    """An operation of a graph.

    Attributes:
        place: among the graph's nodes.
        operator: its kind.
        inputs: names of tensors; empty where one is left out.
        outputs: names of tensors.
        numbers: attributes that are integers.
        lists: attributes that are lists of integers.
    """

    place: int
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]
    lists: Mapping[str, tuple[int, ...]]


class GraphFile:
    """A serialised `ModelProto`."""

    def __init__(self, model: bytes) -> None:
        """Find the graph's parts.

        Raises:
            ValueError: not an ONNX model.
        """
        self._model = memoryview(model)
        graph = next((value for number, value, _ in fields(self._model) if number == _MODEL_GRAPH), None)
        if not isinstance(graph, memoryview):
            raise ValueError("it has no graph")
        self._graph = graph

    @cached_property
    def nodes(self) -> list[Node]:
        """All nodes, in their order."""
        return [_node(place, message) for place, message in enumerate(self._messages(_GRAPH_NODE))]

    @cached_property
    def constants(self) -> dict[str, NDArray[Any]]:
        """The initialisers of types that numpy has, by name."""
        tensors = (_tensor(message) for message in self._messages(_GRAPH_CONSTANT))
        return {name: values for name, values in tensors if values is not None}

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [_text(message, _VALUE_NAME) for message in self._messages(_GRAPH_OUTPUT)]

    @property
    def structure(self) -> str:
        """A hash of operations and shapes, the same for all weights of a network."""
        parts = [[node.operator, node.inputs, node.outputs, dict(node.numbers)] for node in self.nodes]
        shapes = [[name, values.dtype.name, values.shape] for name, values in self.constants.items()]
        return hashlib.sha256(json.dumps([parts, shapes]).encode()).hexdigest()

    def replaced(
        self, constants: Mapping[str, NDArray[Any]], numbers: Mapping[int, Mapping[str, int]]
    ) -> bytes:
        """The model with other constants and attributes; the shapes that it notes of tensors are left out.

        Args:
            constants: new values by name.
            numbers: by a node's place, new values of attributes by name.
        """
        graph, place = bytearray(), 0
        for number, value, encoded in fields(self._graph):
            if number == _GRAPH_NODE:
                if place in numbers:
                    assert isinstance(value, memoryview)
                    encoded = memoryview(encode(_GRAPH_NODE, _with_numbers(value, numbers[place])))
                place += 1
            elif number == _GRAPH_CONSTANT:
                assert isinstance(value, memoryview)
                name = _text(value, _TENSOR_NAME)
                if name in constants:
                    encoded = memoryview(encode(_GRAPH_CONSTANT, _encoded_tensor(name, constants[name])))
            elif number == _GRAPH_SHAPES:
                continue
            graph += encoded
        return b"".join(
            encode(_MODEL_GRAPH, bytes(graph)) if number == _MODEL_GRAPH else bytes(encoded)
            for number, _, encoded in fields(self._model)
        )

    def _messages(self, wanted: int) -> Iterator[memoryview]:
        for number, value, _ in fields(self._graph):
            if number == wanted and isinstance(value, memoryview):
                yield value


def _text(message: memoryview, wanted: int) -> str:
    """A field's text; empty where there is none."""
    return next(_texts(message, wanted), "")


def _texts(message: memoryview, wanted: int) -> Iterator[str]:
    for number, value, _ in fields(message):
        if number == wanted and isinstance(value, memoryview):
            yield bytes(value).decode()


def _integers(message: memoryview, wanted: int) -> list[int]:
    """A repeated field's integers, packed or not."""
    found: list[int] = []
    for number, value, _ in fields(message):
        if number == wanted and value is not None:
            found += [signed(value)] if isinstance(value, int) else numbers(value)
    return found


def _node(place: int, message: memoryview) -> Node:
    single: dict[str, int] = {}
    lists: dict[str, tuple[int, ...]] = {}
    for number, value, _ in fields(message):
        if number == _NODE_ATTRIBUTE and isinstance(value, memoryview):
            name = _text(value, _ATTRIBUTE_NAME)
            single.update((name, integer) for integer in _integers(value, _ATTRIBUTE_NUMBER))
            lists[name] = tuple(_integers(value, _ATTRIBUTE_NUMBERS))
    return Node(
        place=place,
        operator=_text(message, _NODE_OPERATOR),
        inputs=tuple(_texts(message, _NODE_INPUT)),
        outputs=tuple(_texts(message, _NODE_OUTPUT)),
        numbers=single,
        lists=lists,
    )


def _with_numbers(node: memoryview, values: Mapping[str, int]) -> bytes:
    """The node with other values of integer attributes."""
    parts = []
    for number, value, encoded in fields(node):
        if number == _NODE_ATTRIBUTE and isinstance(value, memoryview):
            name = _text(value, _ATTRIBUTE_NAME)
            if name in values:
                rest = [bytes(each.encoded) for each in fields(value) if each.number != _ATTRIBUTE_NUMBER]
                new = b"".join([*rest, encode(_ATTRIBUTE_NUMBER, values[name])])
                parts.append(encode(_NODE_ATTRIBUTE, new))
                continue
        parts.append(bytes(encoded))
    return b"".join(parts)


def _tensor(message: memoryview) -> tuple[str, NDArray[Any] | None]:
    """Name and values of a tensor; None: of a type that numpy does not have."""
    name, sizes = _text(message, _TENSOR_NAME), _integers(message, _TENSOR_SIZES)
    dtype = _DTYPES.get(_integers(message, _TENSOR_TYPE)[0])
    if dtype is None:
        return name, None
    held = {number: value for number, value, _ in fields(message) if isinstance(value, memoryview)}
    values: NDArray[Any]
    if _TENSOR_BYTES in held:
        values = np.frombuffer(held[_TENSOR_BYTES], dtype)
    elif _TENSOR_FLOATS in held:
        values = np.frombuffer(held[_TENSOR_FLOATS], np.float32)
    elif dtype is np.float16:  # kept as integers of the same bits
        values = np.array(_integers(message, _TENSOR_INT32), np.uint16).view(np.float16)
    else:
        field = _TENSOR_INT64 if dtype is np.int64 else _TENSOR_INT32
        values = np.array(_integers(message, field), dtype)
    return name, values.reshape(sizes)


def _encoded_tensor(name: str, values: NDArray[Any]) -> bytes:
    kind = next(number for number, dtype in _DTYPES.items() if values.dtype == dtype)
    parts = [encode(_TENSOR_SIZES, size) for size in values.shape]
    parts += [encode(_TENSOR_TYPE, kind), encode(_TENSOR_NAME, name.encode())]
    return b"".join([*parts, encode(_TENSOR_BYTES, values.tobytes())])
