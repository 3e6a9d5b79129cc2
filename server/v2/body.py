"""The body of an inference request over HTTP: JSON, and binary tensors that follow it.

Its size and counts are limited before anything is built from it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, Any, Final

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.bodies import too_many_images
from server.problems import Problem
from server.v2 import core
from server.v2.regions import Placement
from server.v2.tensors import InputTensor

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_MOST_JSON: Final = 8 << 20  # bytes
# Characters of the JSON, and so objects, lists and values: each can take ten to a hundred bytes of memory.
_MOST: Final = {"{": 4_096, "[": 131_072, ":": 16_384, ",": 524_288}
_FEW: Final = min(_MOST.values())  # characters that cannot be too many, whatever they are

_PLACES: Final = {"shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"}
_DEPTH: Final = 4  # of what is known here: the request, its inputs, one of them, its parameters

Text = Annotated[str, Field(max_length=core.MOST_TEXT)]


class _Json(BaseModel):
    # Strict: a size is no text, and a switch no number. Frozen: pydantic shares defaults instead of copying.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class TensorParameters(_Json):
    """Of any tensor; see `core.place_of`."""

    shared_memory_region: Any = None
    shared_memory_byte_size: Any = None
    shared_memory_offset: Any = None

    def place(self, kind: str, name: str) -> Placement | None:
        """See `core.place_of`; the tensor is of that kind, `input` or `output`, and has that name."""
        if self.model_fields_set.isdisjoint(_PLACES):
            return None
        return core.place_of(f"{kind} {name!r}", dict(self))


class InputParameters(TensorParameters):
    """Of one input."""

    binary_data_size: int | None = Field(default=None, ge=0)


class Input(_Json):
    """An input; `data` is absent when it follows in binary form."""

    name: Text
    shape: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(max_length=core.MOST_DIMENSIONS, fail_fast=True)
    ]
    datatype: Text
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(TensorParameters):
    """Of one requested output."""

    binary_data: bool | None = None
    classification: int = Field(default=0, ge=0)


class Output(_Json):
    """A requested output."""

    name: Text
    parameters: OutputParameters = OutputParameters()


class RequestParameters(_Json):
    """Of the whole request."""

    binary_data_output: bool = False


class InferenceRequest(_Json):
    """The body of an inference request, or its JSON part."""

    id: Text = ""
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[Input], Field(min_length=1, max_length=core.MOST_TENSORS, fail_fast=True)]
    outputs: Annotated[list[Output], Field(max_length=core.MOST_TENSORS, fail_fast=True)] | None = None


def json_length(body: bytes, header_length: str | None) -> int:
    """Bytes of the JSON part.

    Raises:
        Problem: `malformed-request`.
    """
    if header_length is None:
        return len(body)
    digits = header_length[:20]  # as many say more bytes than there are
    if not (digits.isascii() and digits.isdecimal()) or int(digits) > len(body):
        raise Problem("malformed-request", f"{HEADER_LENGTH} is {digits!r}; the body has {len(body)} bytes")
    return int(digits)


def parse(
    body: bytes, header_length: str | None, max_images: int, fetch: Callable[[Placement], bytes]
) -> tuple[InferenceRequest, list[InputTensor]]:
    """A request's JSON part and its tensors.

    Args:
        body: all of it: JSON, then the binary tensors in the order of the inputs that announce one.
        header_length: the header `Inference-Header-Content-Length`: bytes of the JSON part, if not all.
        max_images: the most `BYTES` elements that a tensor in JSON may have.
        fetch: reads a tensor that lies in shared memory.

    Raises:
        Problem: `malformed-request`, `body-too-large`, `too-many-images`, `invalid-parameter`, or `fetch`'s.
    """
    end = json_length(body, header_length)
    binary = memoryview(body)[end:]
    json = body if not binary else memoryview(body)[:end]
    if end > _FEW:
        _check_size(json)
    try:
        # orjson is several times faster than pydantic on long lists of numbers.
        fields = orjson.loads(json)
        if body.find(b"null", 0, end) >= 0:
            fields = _without_nulls(fields)
        header = InferenceRequest.model_validate(fields)
    except orjson.JSONDecodeError as error:
        raise Problem("malformed-request", f"the body is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Problem("malformed-request", f"not an inference request: {where}: {first['msg']}") from None
    tensors = []
    for tensor in header.inputs:
        size = tensor.parameters.binary_data_size
        place = tensor.parameters.place("input", tensor.name)
        data: bytes | memoryview | Sequence[bytes]
        if place is not None:
            if size is not None or tensor.data is not None:
                raise Problem("malformed-request", f"input {tensor.name!r} is here and in shared memory")
            data = fetch(place)
        elif size is None:
            data = _from_json(tensor, max_images)
        elif size > len(binary):
            raise Problem(
                "malformed-request", f"input {tensor.name!r} announces {size} bytes, {len(binary)} are left"
            )
        else:
            data, binary = binary[:size], binary[size:]
        tensors.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, data))
    if binary:
        raise Problem("malformed-request", f"{len(binary)} bytes follow the last tensor")
    return header, tensors


def _check_size(json: bytes | memoryview) -> None:
    """Make sure that parsing takes neither long nor much memory."""
    if len(json) > _MOST_JSON:
        raise Problem(
            "body-too-large",
            f"the JSON part is larger than the limit of {_MOST_JSON:,} bytes; send tensors in binary form",
        )
    for character, most in _MOST.items():
        if len(json) > most and np.count_nonzero(np.frombuffer(json, np.uint8) == ord(character)) > most:
            raise Problem(
                "body-too-large",
                f"the JSON has more than {most:,} times {character!r}; send tensors in binary form",
            )


def _without_nulls(fields: Any, depth: int = _DEPTH) -> Any:
    """Clients made from a schema send null for what they leave out."""
    if isinstance(fields, dict) and depth:
        return {name: _without_nulls(it, depth - 1) for name, it in fields.items() if it is not None}
    if isinstance(fields, list) and depth > 1:
        return [_without_nulls(it, depth - 1) for it in fields]
    return fields


def _from_json(tensor: Input, max_images: int) -> bytes | list[bytes]:
    core.check_datatype(tensor.name, tensor.datatype)
    if tensor.data is None:
        raise Problem("malformed-request", f"input {tensor.name!r} has neither data nor binary_data_size")
    elements = _flat(tensor.name, tensor.data)
    if tensor.datatype == "BYTES":
        if len(elements) > max_images:
            raise too_many_images(max_images)
        try:
            return [base64.b64decode(element, validate=True) for element in elements]
        except (TypeError, ValueError, binascii.Error):
            raise Problem("malformed-request", "BYTES in JSON must be base64 strings") from None
    try:
        if set(map(type, elements)) <= {int}:
            return bytes(elements)
    except ValueError:
        pass
    raise Problem("malformed-request", "UINT8 data must be whole numbers from 0 to 255")


def _flat(name: str, data: list[Any]) -> list[Any]:
    """The elements of nested lists, row by row."""
    for _ in range(core.MOST_DIMENSIONS):
        kinds = set(map(type, data))
        if list not in kinds:
            return data
        if kinds != {list}:
            raise Problem("malformed-request", f"input {name!r} has elements beside rows")
        lengths = sorted(set(map(len, data)))
        if len(lengths) > 1:
            raise Problem(
                "malformed-request",
                f"input {name!r} has rows of unequal length: {lengths[0]} and {lengths[-1]} elements",
            )
        data = list(chain.from_iterable(data))
    raise Problem("malformed-request", f"input {name!r} is nested deeper than {core.MOST_DIMENSIONS} lists")
