"""Loads engine packages that appear or change in the engine directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from runtime.manifest import EngineError, read_manifest
from runtime.packages import Stamp, find_package, find_package_folders, stamp_of
from runtime.signatures import ANYONE, Trust

log = logging.getLogger("trimrt.registry")


class Watcher:
    """Looks again and again. A package is loaded once two looks in a row saw the same: then it is complete.

    What lies in the directory when the watcher is made is not loaded until it changes.

    Args:
        load: loads the package in a folder, or raises `EngineError`, which is logged.
        directory: the engine directory.
        trust: whose packages are used.
    """

    def __init__(
        self, load: Callable[[Path], Awaitable[object]], directory: Path, trust: Trust = ANYONE
    ) -> None:
        self._load = load
        self._trust = trust
        self._directory = directory
        self._trouble = ""
        self._known = self._stamps()
        self._seen = dict(self._known)

    async def run(self, interval: float) -> None:
        """Look every `interval` seconds until cancelled; nothing else ends it."""
        while True:
            await asyncio.sleep(interval)
            await self.look()

    async def look(self) -> None:
        """Load what has changed since it was last loaded, but not since the last look."""
        now = await asyncio.to_thread(self._stamps)
        for folder, stamp in now.items():
            holds_still = stamp == self._seen.get(folder)
            if holds_still and stamp != self._known.get(folder):
                self._known[folder] = stamp
                try:
                    if await asyncio.to_thread(self._is_newest, folder):
                        await self._load(folder)
                except EngineError as error:
                    said = {"folder": str(folder), "reason": str(error)}
                    log.warning("engine package refused", extra=said)
                except Exception:
                    log.exception("an engine package could not be loaded", extra={"folder": str(folder)})
        self._seen = now

    def _is_newest(self, folder: Path) -> bool:
        """Whether there is no newer version; of a package that cannot be read, loading it says why."""
        try:
            name = read_manifest(folder, self._trust).name
        except EngineError:
            return True
        return find_package(self._directory, name, self._trust) == folder

    def _stamps(self) -> dict[Path, Stamp]:
        """The stamp of every package; none while the directory cannot be read, which is logged once."""
        try:
            stamps = {folder: stamp_of(folder) for folder in find_package_folders(self._directory)}
        except Exception as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                log.warning("the engine directory cannot be watched", extra={"reason": self._trouble})
            return {}
        self._trouble = ""
        return stamps
