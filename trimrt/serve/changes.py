"""A change in all processes or in none: all prepare it, then all make it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from runtime.manifest import EngineError
from server.problems import Problem
from server.registry import Change, EngineRow
from trimrt.serve.hanging import LOAD_S
from trimrt.serve.member import Member
from trimrt.serve.state import State


async def change_all(
    workers: Sequence[Member], owner: Member | None, change: Change, state: State
) -> EngineRow:
    """Make a change in all processes and note it in `state`; what became of the engine.

    The owner of engines has a new one first and the old one last, because the workers' slots need it.

    A process that ends while it makes the change is replaced by one that loads the new state.

    Raises:
        EngineError, Problem: a process cannot, and nothing has changed.
    """
    if not workers:
        raise Problem("not-ready", "no worker is ready", headers={"Retry-After": "1"})
    owners = [] if owner is None else [owner]
    willing: list[Member] = []
    for members in (owners, workers):
        prepared = await _ask_all(members, "prepare", change)
        willing += [it for it, answer in zip(members, prepared, strict=True) if not _is_error(answer)]
        if (refusal := _refusal(prepared, owners)) is not None:
            for group in (workers, owners):
                await _ask_all([it for it in group if it in willing], "discard")
            raise refusal
    state.apply(change, *prepared[0])
    rows = await _ask_all(workers, "commit")
    await _ask_all(owners, "commit")
    for row in rows:
        if isinstance(row, EngineRow):
            return row
    raise Problem("not-ready", "all workers ended while they made the change")


async def _ask_all(members: Sequence[Member], method: str, *arguments: Any) -> list[Any]:
    """What each answers, or the exception."""
    return await asyncio.gather(
        *(member.ask(method, *arguments, within=LOAD_S) for member in members), return_exceptions=True
    )


def _is_error(answer: object) -> bool:
    return isinstance(answer, BaseException)


def _refusal(prepared: Sequence[object], owners: Sequence[Member]) -> BaseException | None:
    """Why the processes cannot make a change, by what came of its preparation."""
    errors = [answer for answer in prepared if isinstance(answer, BaseException)]
    if not errors:
        if all(answer == prepared[0] for answer in prepared):
            return None
        return EngineError("the package changed while it was loaded; load it again when it is complete")
    if any(isinstance(error, ConnectionError) for error in errors) or any(it.ended.done() for it in owners):
        detail = "a process ended meanwhile, and nothing was changed; try again"
        return Problem("not-ready", detail, headers={"Retry-After": "1"})
    return errors[0]
