"""The engines at run time: found in the engine directory, loaded, switched and unloaded while serving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.decoding import DecodePool
from server.engines.base import Engine
from server.manifest import MANIFEST_NAME, EngineError, Manifest, read_manifest
from server.problems import Problem
from server.scheduler import Scheduler
from server.settings import Settings
from server.telemetry import Telemetry

log = logging.getLogger("trimrt.registry")

LoadEngine = Callable[[Path], Engine]


def load_engine(folder: Path) -> Engine:
    """See `server.engines.load_engine`."""
    from server import engines  # the backend's library is only imported when there is an engine

    return engines.load_engine(folder)


def find_packages(directory: Path) -> dict[Path, Manifest | EngineError]:
    """The engine packages in `directory`: their manifests, or why one cannot be used."""
    packages: dict[Path, Manifest | EngineError] = {}
    if directory.is_dir():
        for folder in sorted(directory.iterdir()):
            # A leading dot is a package that the builder has not finished.
            if not folder.name.startswith(".") and (folder / MANIFEST_NAME).is_file():
                try:
                    packages[folder] = read_manifest(folder)
                except EngineError as error:
                    packages[folder] = error
    return packages


def find_package(directory: Path, name: str) -> Path:
    """The folder of engine `name` in `directory`; of several versions, the newest.

    Raises:
        EngineError: there is none.
    """
    packages = find_packages(directory)
    found = {
        folder: int(manifest.version)
        for folder, manifest in packages.items()
        if isinstance(manifest, Manifest) and manifest.name == name
    }
    if found:
        return max(found, key=found.__getitem__)
    broken = packages.get(directory / name)
    if isinstance(broken, EngineError):
        raise broken
    names = sorted({manifest.name for manifest in packages.values() if isinstance(manifest, Manifest)})
    there = f"it holds {', '.join(names)}" if names else "it holds none"
    raise EngineError(f"no engine {name!r} in {directory} ({there}); `trimrt build` makes one")


def resolve_engines(settings: Settings) -> list[Path]:
    """The package folders that `settings.engine` names; the first is the default.

    Raises:
        EngineError: one of them does not exist, or none is named and the directory does not hold exactly one.
    """
    names = [name.strip() for name in settings.engine.split(",") if name.strip()]
    if not names:
        packages = find_packages(settings.engine_dir)
        if len(packages) == 1:
            return list(packages)
        if not packages:
            raise EngineError(f"no engine package in {settings.engine_dir}; `trimrt build` makes one")
        raise EngineError(
            f"{settings.engine_dir} holds {len(packages)} engine packages; choose with --engine NAME: "
            + ", ".join(folder.name for folder in packages)
        )
    return [
        Path(name) if (Path(name) / MANIFEST_NAME).is_file() else find_package(settings.engine_dir, name)
        for name in names
    ]


class Registry:
    """Loaded engines by name. All of its methods run on the event loop."""

    def __init__(self, settings: Settings, telemetry: Telemetry, load: LoadEngine = load_engine) -> None:
        self.loaded: dict[str, Scheduler] = {}
        self.default: str | None = None
        self._settings = settings
        self._telemetry = telemetry
        self._load = load
        self._decoder = DecodePool(settings.decode_threads)
        self._changing = asyncio.Lock()

    def get(self, name: str | None) -> Scheduler:
        """The loaded engine `name`, or the default one.

        Raises:
            Problem: `engine-not-found`, or `not-ready` while the default is still loading.
        """
        scheduler = self.loaded.get(name or self.default or "")
        if scheduler is not None:
            return scheduler
        if name is None:
            raise Problem("not-ready", "no engine is loaded yet", headers={"Retry-After": "1"})
        raise Problem(
            "engine-not-found",
            f"no engine {name!r} is loaded; loaded: {', '.join(sorted(self.loaded)) or 'none'}",
        )

    async def load(self, folder: Path) -> Scheduler:
        """Load the package in `folder` beside what runs, then put it in the place of its namesake, if any.

        The namesake answers what it had admitted before it is closed; no request is dropped.

        Raises:
            EngineError: the package is refused; what ran before still runs.
        """
        async with self._changing:
            engine = await asyncio.to_thread(self._load, folder)
            manifest = engine.manifest
            scheduler = Scheduler(
                engine,
                self._decoder,
                self._telemetry.engine(manifest),
                queue_limit=self._settings.queue_limit,
                max_pixels=self._settings.max_pixels,
                max_batch_delay=self._settings.max_batch_delay_ms / 1000,
            )
            await scheduler.start()
            replaced = self.loaded.get(manifest.name)
            self.loaded[manifest.name] = scheduler
            if self.default is None:
                self.default = manifest.name
            log.info("engine loaded", extra={"engine": manifest.name, "version": manifest.version})
            if replaced is not None:
                await replaced.close()
            return scheduler

    async def close(self) -> None:
        """Answer what was admitted, and free every engine."""
        async with self._changing:
            schedulers = list(self.loaded.values())
            self.loaded.clear()
            self.default = None
            await asyncio.gather(*(scheduler.close() for scheduler in schedulers))
        await asyncio.to_thread(self._decoder.close)

    def describe(self) -> list[dict[str, Any]]:
        """Every engine that is loaded or could be, for `GET /engines`."""
        rows = {}
        for folder, manifest in find_packages(self._settings.engine_dir).items():
            if isinstance(manifest, EngineError):
                rows[folder.name] = {
                    "name": folder.name,
                    "state": "refused",
                    "default": False,
                    "error": str(manifest),
                }
            else:
                rows[manifest.name] = self._row(manifest, "available")
        for name, scheduler in self.loaded.items():
            rows[name] = self._row(scheduler.engine.manifest, "loaded")
        return [rows[name] for name in sorted(rows)]

    def _row(self, manifest: Manifest, state: str) -> dict[str, Any]:
        return {
            "name": manifest.name,
            "state": state,
            "default": manifest.name == self.default,
            "version": manifest.version,
            "backend": manifest.backend,
            "precision": manifest.precision,
            "classes": len(manifest.labels),
            "height": manifest.preprocessing.height,
            "width": manifest.preprocessing.width,
            "max_batch": manifest.batch.max,
        }
