"""What the options of several commands share; those of a settings model are made from its fields."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from models.folders import ON_DAMAGED_TEXT, OnDamaged
from models.naming import did_you_mean, nothing_at
from runtime.signatures import Trust, trust_in

HELP: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


class Command(click.Command):
    """A command whose help ends with examples.

    Attributes:
        examples: command lines, as they are typed.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog and the examples."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


class Choice(click.Choice[str]):
    """One of some words; of a wrong one it is said which may have been meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What is wrong."""
        message = super().get_invalid_choice_message(value, ctx)
        return f"{message.removesuffix('.')}{did_you_mean(str(value), self.choices)}."


class Existing(click.Path):
    """A path with something at it; of a wrong one it is said which may have been meant."""

    def __init__(self, *, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(exists=True, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        path = Path(os.fsdecode(value))
        if not os.path.lexists(path):
            self.fail(nothing_at(path), param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


ENGINES: Final = Path("engines")
COUNT: Final = click.IntRange(min=1)
POSITIVE: Final = click.FloatRange(min=0, min_open=True)
FILE: Final = click.Path(path_type=Path, dir_okay=False)
FOLDER: Final = click.Path(path_type=Path, file_okay=False)


def _trusted(_context: click.Context, _option: click.Parameter, files: str | None) -> Trust:
    return trust_in(files)


trusted_key_option: Final = click.option(
    "--trusted-key",
    "trust",
    metavar="FILES",
    callback=_trusted,
    help="Use nothing that none of these keys has signed (`trimrt sign`): files of public keys, with commas.",
)
engine_dir_option: Final = click.option(
    "--engine-dir", type=FOLDER, default=ENGINES, help="Where engine packages are found by name."
)
on_damaged_option: Final = click.option(
    "--on-damaged", type=Choice(get_args(OnDamaged)), default="stop", help=ON_DAMAGED_TEXT
)

_LONGEST_CHOICES: Final = 74  # beside an option's name, on a terminal of 80 columns

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Model = TypeVar("_Model", bound=BaseModel)


def options_of(
    model: type[BaseModel], *, only: Collection[str] | None = None, within: tuple[str, ...] = ()
) -> Callable[[_Command], _Command]:
    """A decorator that gives a command an option for each field of `model` and of the models within it.

    An option that is not given is None. `--teacher-epochs` is the parameter `teacher__epochs`. Fields that
    are lists get no option.

    Args:
        model: its fields become options.
        only: names of the fields; None: all.
        within: what their names begin with.
    """

    def decorate(command: _Command) -> _Command:
        for path, kind, text in reversed(list(_fields(model, within))):
            if only is not None and path[-1] not in only:
                continue
            flag = "--" + "-".join(path).replace("_", "-")
            switch = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
            kind, metavar = _click_type(kind), None
            if isinstance(kind, Choice) and len(flag) + len("|".join(kind.choices)) > _LONGEST_CHOICES:
                metavar, text = "WORD", f"One of {', '.join(kind.choices)}. {text}"
            option = click.option(
                switch, "__".join(path), type=kind, metavar=metavar, default=None, help=text
            )
            command = option(command)
        return command

    return decorate


def take(model: type[_Model], values: dict[str, Any]) -> _Model:
    """The model that the given options make; they are taken out of `values`.

    Raises:
        click.UsageError: a value is not valid, or some contradict each other.
    """
    given = {name: values.pop(name, None) for name in model.model_fields}
    try:
        return model(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "".join(f"--{str(name).replace('_', '-')}: " for name in first["loc"][:1])
        raise click.UsageError(f"{flag}{first['msg']}") from None


def one_or_more_of(
    known: Sequence[str],
) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...] | None]:
    """A callback that splits an option's value at its commas; each part must be one of `known`."""

    def parse(
        _context: click.Context, _parameter: click.Parameter, value: str | None
    ) -> tuple[str, ...] | None:
        if value is None:
            return None
        chosen = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        if unknown := [part for part in chosen if part not in known]:
            like = did_you_mean(unknown[0], known)
            raise click.BadParameter(f"{', '.join(map(repr, unknown))}{like}: choose from {', '.join(known)}")
        return chosen

    return parse


def _fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Where each field is, what it takes, and its help."""
    hints = typing.get_type_hints(model)
    for name, field in model.model_fields.items():
        kind = hints[name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, (*path, name))
        elif typing.get_origin(kind) is not list:
            default = shown_default(field)
            shown = f"  [default: {default}]" if default else ""
            yield (*path, name), kind, f"{field.description or ''}{shown}"


def shown_default(field: FieldInfo) -> str:
    """A field's default as help shows it; empty where there is none to show."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default in (None, PydanticUndefined) else str(default)


def _click_type(kind: Any) -> click.ParamType[Any] | type:
    if typing.get_origin(kind) is typing.Literal:
        return Choice(typing.get_args(kind))
    if kind is Path:
        return FILE
    return typing.cast(type, kind)
