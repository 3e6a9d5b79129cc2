"""The base of every error that a user can put right."""

from __future__ import annotations

from typing import ClassVar


class TrimRTError(Exception):
    """Something that a user can put right: the message says what is wrong and what to do.

    The command line prints the message alone. Any other exception is a bug and keeps its traceback.

    Attributes:
        problem: name of the problem that the server answers with, a key of `server.problems.PROBLEMS`;
            None where that depends on the request.
    """

    problem: ClassVar[str | None] = None
