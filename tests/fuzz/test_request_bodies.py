"""Bodies of any kind: each is taken apart, or refused as the client's fault."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import example, given
from hypothesis import strategies as st

from server.bodies import Part, parse_multipart
from server.problems import Problem
from server.v2.body import parse
from server.v2.regions import Regions
from server.v2.tensors import pack_bytes

T = TypeVar("T")

NO_REGIONS = Regions(enabled=False, largest=0)
FORM = "multipart/form-data; boundary=b"


def _taken_apart(take: Callable[[], T]) -> T | None:
    """What `take` returns; None if it refuses, for which the client must be to blame."""
    try:
        return take()
    except Problem as problem:
        refusal = problem
    assert 400 <= refusal.status < 500
    assert len(refusal.detail) < 1_500
    return None


# --- forms ----------------------------------------------------------------------------------------------

_FORM_PIECES = st.sampled_from(
    [
        *(
            b"--b",
            b"--b--",
            b"\r\n",
            b"\r\n\r\n",
            b"\r",
            b"\n",
            b"-",
            b" ",
            b":",
            b";",
            b'"',
            b"\\",
            b"=",
            b"\0",
        ),
        *(
            b"Content-Disposition: form-data",
            b'; name="file"',
            b'; filename="x"',
            b"; filename*=UTF-8''%e2%82",
        ),
        *(b"Content-Type: image/png", b"image"),
    ]
)


@given(st.lists(_FORM_PIECES | st.binary(max_size=5), max_size=40).map(b"".join))
@example(b"--b--")
def test_any_form(body: bytes) -> None:
    _taken_apart(lambda: parse_multipart(FORM, body, 4))


@given(st.text(max_size=80), st.binary(max_size=80))
def test_any_content_type_of_a_form(content_type: str, body: bytes) -> None:
    _taken_apart(lambda: parse_multipart(f"multipart/form-data{content_type}", body, 4))


_NAMES = st.text(st.characters(exclude_characters='"\\\r\n', exclude_categories=["Cs"]), max_size=30)


@given(
    st.lists(st.tuples(_NAMES, st.none() | _NAMES, st.binary(max_size=100)), max_size=8),
    st.text("abcXYZ019-", min_size=20, max_size=70),
    st.binary(max_size=20),
)
def test_a_form_gives_what_was_put_into_it(
    fields: list[tuple[str, str | None, bytes]], boundary: str, preamble: bytes
) -> None:
    delimiter = b"--" + boundary.encode()
    parts = [Part(name, filename, data.replace(delimiter, b"")) for name, filename, data in fields]
    body = preamble.replace(delimiter, b"") + b"\r\n"
    for name, filename, data in parts:
        head = f'Content-Disposition: form-data; name="{name}"'
        if filename is not None:
            head += f'; filename="{filename}"'
        body += delimiter + b"\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n"
    body += delimiter + b"--\r\nepilogue"
    assert parse_multipart(f"multipart/form-data; boundary={boundary}", body, 8) == parts


# --- the Open Inference Protocol ------------------------------------------------------------------------

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.binary(max_size=9).map(lambda data: base64.b64encode(data).decode())
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "classification", "shared_memory_region"]), inner, max_size=3
        )
    ),
    max_leaves=20,
)


def _objects(**members: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects that have the members they should, mostly."""
    return st.fixed_dictionaries({}, optional={name: kind | _VALUES for name, kind in members.items()})


_INPUTS = _objects(
    name=st.just("pixels"),
    datatype=st.sampled_from(["UINT8", "BYTES", "FP32"]),
    shape=st.lists(st.integers(-1, 5), max_size=9),
    data=st.lists(st.integers(0, 255), max_size=9),
    parameters=_objects(binary_data_size=st.integers(-1, 40)),
)
_REQUESTS = _objects(
    id=st.text(max_size=5),
    inputs=st.lists(_INPUTS, max_size=3),
    outputs=st.lists(_objects(name=st.just("logits"), parameters=_objects()), max_size=3),
    parameters=_objects(binary_data_output=st.booleans()),
)


@given(_REQUESTS, st.binary(max_size=40), st.none() | st.integers(-2, 2))
def test_any_inference_request(request: dict[str, Any], binary: bytes, off: int | None) -> None:
    head = json.dumps(request).encode()
    length = None if off is None else str(len(head) + off)
    _taken_apart(lambda: parse(head + binary, length, 4, NO_REGIONS.read))


@given(st.text('[]{}",:0123456789.eE-+\\u ', max_size=200), st.text(max_size=10))
def test_any_text_for_json(text: str, length: str) -> None:
    _taken_apart(lambda: parse(text.encode(), None, 4, NO_REGIONS.read))
    _taken_apart(lambda: parse(text.encode(), length, 4, NO_REGIONS.read))


@given(st.lists(st.lists(st.binary(max_size=30), max_size=4), min_size=1, max_size=3))
def test_binary_tensors_are_told_apart(tensors: list[list[bytes]]) -> None:
    packed = [pack_bytes(elements) for elements in tensors]
    inputs = [
        {
            "name": "pixels",
            "datatype": "BYTES",
            "shape": [len(elements)],
            "parameters": {"binary_data_size": len(data)},
        }
        for elements, data in zip(tensors, packed, strict=True)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    _, found = parse(head + b"".join(packed), str(len(head)), 4, NO_REGIONS.read)
    assert [bytes(tensor.data) for tensor in found] == packed
