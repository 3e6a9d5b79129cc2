"""Tensors as the protocol carries them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.bodies import too_many_images
from server.problems import Problem

Floats = NDArray[np.float32]


class InputTensor(NamedTuple):
    """An input as it came.

    Attributes:
        name: the tensor's name.
        datatype: `UINT8` or `BYTES`, as the client says.
        shape: as the client says; nothing is checked yet.
        data: for `UINT8`, the numbers in row-major order; for `BYTES`, packed bytes or the elements.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes | memoryview | Sequence[bytes]


class OutputTensor(NamedTuple):
    """An output: `FP32` numbers of shape `(images, classes)`, or `BYTES` strings of shape `(images, k)`."""

    name: str
    values: Floats | list[list[str]]

    @property
    def datatype(self) -> str:
        """The protocol's name of the element type."""
        return "BYTES" if isinstance(self.values, list) else "FP32"

    @property
    def shape(self) -> list[int]:
        """Images by classes, or by the number of classes asked for."""
        if isinstance(self.values, list):
            return [len(self.values), len(self.values[0])]
        return list(self.values.shape)

    def raw(self) -> bytes:
        """The elements in the protocol's binary form."""
        if isinstance(self.values, list):
            return pack_bytes([element.encode() for row in self.values for element in row])
        return np.ascontiguousarray(self.values, "<f4").tobytes()


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """`BYTES` elements in binary form: each after its length, a little-endian `uint32`."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def unpack_bytes(packed: bytes | memoryview, max_images: int) -> list[bytes]:
    """The reverse of `pack_bytes`, for at most `max_images` elements.

    Raises:
        Problem: `malformed-request` or `too-many-images`.
    """
    elements: list[bytes] = []
    position, view = 0, memoryview(packed)
    while position < len(view):
        if len(elements) == max_images:
            raise too_many_images(max_images)
        if position + 4 > len(view):
            raise Problem("malformed-request", "a BYTES tensor ends inside a length")
        (length,) = struct.unpack_from("<I", view, position)
        position += 4
        if position + length > len(view):
            raise Problem("malformed-request", f"a BYTES element of {length} bytes ends after the tensor")
        elements.append(bytes(view[position : position + length]))
        position += length
    return elements
