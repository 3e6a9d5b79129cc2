"""The base of every error that a user can put right."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError


class TrimRTError(Exception):
    """Something that a user can put right: the message says what is wrong and what to do.

    The command line prints the message alone. Any other exception is a bug and keeps its traceback.

    Attributes:
        problem: name of the problem that the server answers with, a key of `server.problems.PROBLEMS`;
            None where that depends on the request.
    """

    problem: ClassVar[str | None] = None


def faults(error: ValidationError) -> str:
    """What is wrong with the contents of a file, by the names of its members."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
        for fault in error.errors(include_url=False, include_context=False, include_input=False)
    )
