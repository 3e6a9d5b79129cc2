"""Protobuf's text format, as much of it as a configuration needs; the server does not need protobuf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = "str | int | bool | Mapping[str, Value] | Sequence[Value]"
Message: TypeAlias = Mapping[str, Value]


class Enum(str):
    """An enumeration's value, which is not quoted."""

    __slots__ = ()


def dump(message: Message) -> str:
    """`message` in the text format: mappings are messages, sequences are repeated fields."""
    return "".join(f"{line}\n" for line in _lines(message, ""))


def entries(fields: Mapping[str, Message]) -> list[Message]:
    """The value of a map field."""
    return [{"key": key, "value": value} for key, value in fields.items()]


def _lines(message: Message, indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name} {{"
            yield from _lines(value, indent + "  ")
            yield f"{indent}}}"
        elif isinstance(value, str | int):
            yield f"{indent}{name}: {_scalar(value)}"
        elif value and isinstance(value[0], Mapping):
            for item in value:
                yield from _lines({name: item}, indent)
        else:
            yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum | int):
        return str(value)
    assert isinstance(value, str)
    return f'"{"".join(map(_escaped, value))}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else "".join(f"\\{byte:03o}" for byte in character.encode())
