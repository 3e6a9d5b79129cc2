"""A change in all workers or in none: all prepare it, then all make it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from runtime.manifest import EngineError
from server.problems import Problem
from server.registry import Change, EngineRow
from trimrt.serve.member import Member
from trimrt.serve.state import State


async def change_all(members: Sequence[Member], change: Change, state: State) -> EngineRow:
    """Make a change in all workers and note it in `state`; what became of the engine.

    A worker that ends while it makes the change is replaced by one that loads the new state.

    Raises:
        EngineError, Problem: a worker cannot, and nothing has changed.
    """
    prepared: list[Any] = await asyncio.gather(
        *(member.channel.call("prepare", change) for member in members), return_exceptions=True
    )
    if (refusal := _refusal(prepared)) is not None:
        willing = [
            member
            for member, answer in zip(members, prepared, strict=True)
            if not isinstance(answer, BaseException)
        ]
        await asyncio.gather(*(member.channel.call("discard") for member in willing), return_exceptions=True)
        raise refusal
    state.apply(change, *prepared[0])
    rows: list[EngineRow | BaseException] = await asyncio.gather(
        *(member.channel.call("commit") for member in members), return_exceptions=True
    )
    return next(row for row in rows if not isinstance(row, BaseException))


def _refusal(prepared: Sequence[object]) -> BaseException | None:
    """Why the workers cannot make a change, by what came of its preparation."""
    if not prepared:
        return Problem("not-ready", "no worker is ready", headers={"Retry-After": "1"})
    for answer in prepared:
        if isinstance(answer, ConnectionError):
            detail = "a worker ended meanwhile, and nothing was changed; try again"
            return Problem("not-ready", detail, headers={"Retry-After": "1"})
        if isinstance(answer, BaseException):
            return answer
    if any(answer != prepared[0] for answer in prepared):
        return EngineError("the package changed while it was loaded; load it again when it is complete")
    return None
