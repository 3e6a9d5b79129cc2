"""Hypothesis strategies for files that are nearly right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD_TEXTS = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\n", "-x", "é", "x" * 300]
ODD_NUMBERS = [0, -1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf")]
ODD_VALUES = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    st.sampled_from([*ODD_TEXTS, *ODD_NUMBERS]),
    st.lists(st.integers() | st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.sampled_from([1, 60]).map(nested),
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value`, itself included, with each of its keys."""
    if isinstance(value, (dict, list)):
        for key, member in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(member)


@st.composite
def changed_documents(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """`document`, of JSON, with one to three members replaced, taken out or put in, at any depth."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if not (places := list(_places(changed))):
            break
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace":
            container[key] = draw(ODD_VALUES)
        elif change == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.text(max_size=5))] = draw(ODD_VALUES)
        else:
            container.append(draw(ODD_VALUES))
    return changed


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """`data`, cut off somewhere or with up to eight stretches overwritten, taken out or put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, len(changed)))
        stretch = draw(st.binary(min_size=1, max_size=8))
        changed[place : place + draw(st.integers(0, 8))] = stretch
    return bytes(changed[: draw(st.integers(0, len(changed)) | st.just(len(changed)))])
