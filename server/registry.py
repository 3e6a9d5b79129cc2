"""The engines at run time: found in the engine directory, loaded, switched and unloaded while serving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from pydantic import BaseModel

from runtime.engine import Engine, Options
from runtime.health import EngineLostError, Health
from runtime.loading import load_engine
from runtime.manifest import Activation, EngineError, Manifest
from runtime.packages import Stamp, choose_packages, find_package, stamp_of, survey
from runtime.threads import run_in_engine_thread
from server.answers import AnswerCache
from server.decoding import DecodePool
from server.decoding_limits import DecodingLimits
from server.problems import Problem
from server.scheduler import Scheduler
from server.settings import Settings
from server.shadow import Shadow
from server.telemetry import Telemetry

log = logging.getLogger("trimrt.registry")

LoadEngine = Callable[[Path], Engine]


def engine_options(settings: Settings) -> Options:
    """How an engine is to use this machine."""
    return Options(
        slots=settings.slots,
        threads=settings.inference_threads,
        cuda=settings.cuda,
        cuda_graphs=settings.cuda_graphs,
        host_code=settings.host_code,
        share=settings.workers,
        trust=settings.trust,
    )


def resolve_engines(settings: Settings) -> list[Path]:
    """The package folders that `settings.engine` names; the first is the default. See `choose_packages`."""
    names = [name.strip() for name in settings.engine.split(",") if name.strip()]
    return choose_packages(settings.engine_dir, names, trust=settings.trust, may_be_empty=settings.watch)


class Load(NamedTuple):
    """Load the package in `folder` beside what runs, then put it in the place of its namesake, if any.

    The namesake answers what it had admitted before it is closed; no request is dropped.
    """

    folder: Path


class Unload(NamedTuple):
    """Answer what the engine `name` had admitted, then free it."""

    name: str


class MakeDefault(NamedTuple):
    """Let the engine `name` answer the requests that name no engine, from the next one on."""

    name: str


Change: TypeAlias = "Load | Unload | MakeDefault"


@dataclass(frozen=True)
class Prepared:
    """A change whose only missing step cannot fail. One of the two functions must be called.

    Attributes:
        scheduler: of the engine that it is about.
        commit: makes the change; what became of the engine.
        discard: leaves everything as it was.
    """

    scheduler: Scheduler
    commit: Callable[[], Awaitable[EngineRow]]
    discard: Callable[[], Awaitable[None]]


class EngineRow(BaseModel):
    """One engine in `GET /engines`; a refused package has no more than its folder's name and the reason."""

    name: str
    state: Literal["loaded", "available", "refused"]
    default: bool = False
    version: str | None = None
    backend: str | None = None
    precision: str | None = None
    activation: Activation | None = None
    classes: int | None = None
    height: int | None = None
    width: int | None = None
    max_batch: int | None = None
    reason: str | None = None


class Registry:
    """Loaded engines by name. All of its methods run on the event loop."""

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        load: LoadEngine | None = None,
        on_lost: Callable[[EngineLostError], None] | None = None,
    ) -> None:
        self.loaded: dict[str, Scheduler] = {}
        self.default: str | None = None
        self.shadows: dict[str, Shadow] = {}
        self._refusal = ""
        self._refusals: dict[Path, tuple[Stamp, str]] = {}  # why a package could not be loaded
        self._folders: dict[str, Path] = {}
        self._settings = settings
        self._telemetry = telemetry
        self._load = load or partial(load_engine, options=engine_options(settings))
        self._pool = DecodePool(settings.decode_threads)
        most = (settings.cache_mib << 20) // settings.workers
        self.answers = AnswerCache(most) if most else None
        self.decoding_limits = DecodingLimits(settings)
        self._on_lost = on_lost
        self._changing = asyncio.Lock()

    def get(self, name: str | None) -> Scheduler:
        """The loaded engine `name`, or the default one.

        Raises:
            Problem: `engine-not-found`, or `not-ready` while the default is still loading.
        """
        wanted = self.default if name is None else name
        if wanted is not None and wanted in self.loaded:
            return self.loaded[wanted]
        if name is None:
            detail = f"no engine is loaded yet{self._refusal and f'; {self._refusal}'}"
            raise Problem("not-ready", detail, headers={"Retry-After": "1"})
        raise Problem(
            "engine-not-found",
            f"no engine {name!r} is loaded; loaded: {', '.join(sorted(self.loaded)) or 'none'}",
        )

    def served(self) -> dict[str, tuple[Path, str]]:
        """The folder and the manifest, in JSON, of every loaded engine by name."""
        return {
            name: (self._folders[name], scheduler.engine.manifest.model_dump_json())
            for name, scheduler in self.loaded.items()
        }

    def check_health(self) -> None:
        """Raise the problem `not-ready` if an engine is lost that is more than tried."""
        for name, scheduler in self.loaded.items():
            if scheduler.health.lost is not None and not self._is_tried(name):
                raise Problem("not-ready", scheduler.health.lost)

    def _is_tried(self, name: str) -> bool:
        """Whether the engine `name` is a shadow, and not the one for requests that name none."""
        return name in self.shadows and name != self.default

    def _tell_lost(self, name: str, error: EngineLostError) -> None:
        if self._on_lost is not None and not self._is_tried(name):
            self._on_lost(error)

    def _is_busy(self) -> bool:
        """Whether anybody waits for an engine."""
        return any(scheduler.pending for scheduler in self.loaded.values())

    def shadow(self, name: str) -> Shadow:
        """The shadow that the engine `name` is.

        Raises:
            Problem: `engine-not-found`: it is none.
        """
        if name not in self.shadows:
            raise Problem("engine-not-found", f"{name!r} is no engine's shadow")
        return self.shadows[name]

    def set_shadow(self, name: str, of: str, share: float) -> None:
        """Run the loaded engine `name` on a share of the images that the engine `of` answers.

        Raises:
            Problem: `engine-not-found`, `invalid-parameter` or `not-supported`.
        """
        if self._settings.workers > 1:
            raise Problem("not-supported", "shadows are for one worker; each would compare images of its own")
        shadow = Shadow(self.get(name), self.get(of), share, self._is_busy)
        if name in self.shadows:
            self.end_shadow(name)
        self.shadows[name] = shadow
        self._telemetry.observers.append(shadow)

    def end_shadow(self, name: str) -> None:
        """Let the engine `name` be no shadow any more.

        Raises:
            Problem: `engine-not-found`: it is none.
        """
        shadow = self.shadow(name)
        del self.shadows[name]
        self._telemetry.observers.remove(shadow)
        shadow.close()

    def _end_shadows(self, scheduler: Scheduler) -> None:
        """End those that compare an engine which is about to go."""
        for name, shadow in list(self.shadows.items()):
            if scheduler in (shadow.candidate, shadow.primary):
                self.end_shadow(name)

    async def find(self, name: str) -> Path:
        """The folder of the newest package of that name.

        Raises:
            Problem: `engine-not-found`.
        """
        try:
            return await asyncio.to_thread(
                find_package, self._settings.engine_dir, name, self._settings.trust
            )
        except EngineError as error:
            loaded = self._folders.get(name)
            if loaded is None:
                raise Problem("engine-not-found", readable(str(error))) from None
            return loaded  # served from outside the engine directory

    async def change(self, change: Change) -> EngineRow:
        """Make a change; changes wait for each other.

        Raises:
            EngineError: the package is refused; what ran before still runs.
            Problem: `engine-not-found`, or `engine-in-use` for the default engine.
        """
        async with nullcontext() if isinstance(change, MakeDefault) else self._changing:
            return await (await self.prepare(change)).commit()

    async def prepare(self, change: Change) -> Prepared:
        """Do of a change what can fail; for callers that keep changes apart themselves.

        Raises:
            EngineError, Problem: see `change`.
        """
        if isinstance(change, Load):
            scheduler = await self._start(change.folder)
            return Prepared(scheduler, partial(self._put, scheduler, change.folder), scheduler.close)
        scheduler = self.get(change.name)
        if isinstance(change, Unload) and change.name == self.default:
            raise Problem(
                "engine-in-use", f"{change.name} is the default engine; make another the default first"
            )
        act = self._remove if isinstance(change, Unload) else self._make_default
        return Prepared(scheduler, partial(act, scheduler), partial(asyncio.sleep, 0))

    async def _put(self, scheduler: Scheduler, folder: Path) -> EngineRow:
        manifest = scheduler.engine.manifest
        replaced = self.loaded.get(manifest.name)
        self.loaded[manifest.name] = scheduler
        self._folders[manifest.name] = folder
        if self.default is None:
            self.default = manifest.name
        log.info("engine loaded", extra={"engine": manifest.name, "version": manifest.version})
        if replaced is not None:
            self._end_shadows(replaced)
            await replaced.close()
        return self._row(manifest, "loaded")

    async def _remove(self, scheduler: Scheduler) -> EngineRow:
        manifest = scheduler.engine.manifest
        del self.loaded[manifest.name], self._folders[manifest.name]
        self._end_shadows(scheduler)
        await scheduler.close()
        return self._row(manifest, "available")

    async def _make_default(self, scheduler: Scheduler) -> EngineRow:
        self.default = scheduler.engine.manifest.name
        return self._row(scheduler.engine.manifest, "loaded")

    async def _start(self, folder: Path) -> Scheduler:
        stamp = await asyncio.to_thread(stamp_of, folder)
        try:
            scheduler = await self._start_checked(folder)
        except EngineError as error:
            self._refusal = readable(str(error))
            self._refusals[folder] = stamp, str(error)
            raise
        self._refusals.pop(folder, None)
        return scheduler

    async def _start_checked(self, folder: Path) -> Scheduler:
        engine = await run_in_engine_thread(partial(self._open, folder))
        manifest = engine.manifest
        scheduler = Scheduler(
            engine,
            self._pool,
            self._telemetry.engine(manifest),
            queue_limit=self._settings.queue_limit,
            decoding_limits=self.decoding_limits,
            health=Health(
                manifest.name, self._settings.max_failed_batches, partial(self._tell_lost, manifest.name)
            ),
            max_batch_delay=self._settings.max_batch_delay_ms / 1000,
            linux_scheduling=self._settings.linux_scheduling,
            answers=None if self.answers is None else self.answers.of(manifest),
        )
        try:
            await scheduler.start()
        except Exception as error:
            error.__traceback__ = None  # see `Worker.run`
            raise EngineError(
                f"{folder} does not run: {error}; rebuild it: {manifest.build_command}"
            ) from error
        return scheduler

    def _open(self, folder: Path) -> Engine:
        try:
            return self._load(folder)
        except EngineError:
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__  # as of MemoryError
            raise EngineError(f"{folder} cannot be loaded: {reason}") from error

    async def close(self) -> None:
        """Answer what was admitted, and free every engine."""
        async with self._changing:
            for name in list(self.shadows):
                self.end_shadow(name)
            schedulers = list(self.loaded.values())
            self.loaded.clear()
            self._folders.clear()
            self.default = None
            await asyncio.gather(*(scheduler.close() for scheduler in schedulers))
        await asyncio.to_thread(self._pool.close)

    async def describe(self) -> list[EngineRow]:
        """Every engine that is loaded or could be, and every package that is refused, by name."""
        refusals = dict(self._refusals)
        directory, trust = self._settings.engine_dir, self._settings.trust
        usable, refused = await asyncio.to_thread(survey, directory, refusals, trust)
        rows = [
            EngineRow(name=readable(folder.name), state="refused", reason=readable(reason))
            for folder, reason in refused.items()
        ]
        rows += [
            self._row(manifest, "available") for name, manifest in usable.items() if name not in self.loaded
        ]
        rows += [self._row(it.engine.manifest, "loaded") for it in self.loaded.values()]
        return sorted(rows, key=lambda row: (row.name, row.state != "refused"))

    def _row(self, manifest: Manifest, state: Literal["loaded", "available"]) -> EngineRow:
        return EngineRow(
            name=manifest.name,
            state=state,
            default=manifest.name == self.default,
            version=manifest.version,
            backend=manifest.backend,
            precision=manifest.precision,
            activation=manifest.activation,
            classes=len(manifest.labels),
            height=manifest.preprocessing.height,
            width=manifest.preprocessing.width,
            max_batch=manifest.batch.max,
        )


def readable(text: str) -> str:
    """`text` without the surrogates of a file name that is not UTF-8, which JSON cannot hold."""
    return text.encode(errors="backslashreplace").decode()
