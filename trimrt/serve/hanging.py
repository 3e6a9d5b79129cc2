"""Processes that hang are killed: stopped, stuck in native code, or with a device that does not answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from trimrt.serve.member import Member

LOAD_S: Final = 600.0  # what takes longer to load an engine, or to answer what an old one had admitted, hangs
_BEGIN_S: Final = 120.0  # in which a new process can be asked something
_PAUSE_S: Final = 1.0  # between questions


async def watch(member: Member, limit: float) -> None:
    """Until it ends, kill a process that does not answer for `limit` seconds, or whose batches do not end."""
    with suppress(ConnectionError):
        await member.ask("ping", within=max(limit, _BEGIN_S))
        while True:
            stalled = await member.ask("ping", within=limit)
            if stalled > limit:
                member.kill(f"process {member.pid} has computed at a batch for {stalled:.0f} s")
            await asyncio.sleep(_PAUSE_S)


async def wait_until_loaded(member: Member, engines: int) -> None:
    """Return when a new process has loaded so many engines, or has ended; kill it if that takes too long."""
    await asyncio.wait([member.ready], timeout=LOAD_S * max(1, engines))
    if not member.ready.done():
        member.kill(f"process {member.pid} takes too long to load its engines")
        await member.ready
