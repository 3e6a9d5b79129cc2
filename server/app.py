"""The application: one object that uvicorn, Ray Serve or a test can run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_longlong
from pathlib import Path
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from runtime.devices import find_devices
from runtime.manifest import EngineError
from runtime.watching import Watcher
from server.bodies import BodyMemory
from server.fleet import Alone, Fleet
from server.keeping import Keeper
from server.lifecycle import Lifecycle, settle_memory
from server.metrics import Metrics
from server.middleware import RequestContext
from server.problems import Problem, internal_error
from server.rates import RateLimit
from server.registry import Load, LoadEngine, Registry, resolve_engines
from server.routes import docs, engines, health, observability, page, predict, shadows, stream
from server.service import Service, service_of
from server.settings import Settings
from server.telemetry import RequestObserver, Sampling, Telemetry
from server.v2 import rest, rest_extensions
from server.v2.body import HEADER_LENGTH
from server.v2.regions import Regions
from server.version import VERSION

log = logging.getLogger("trimrt")

OnFailure: TypeAlias = "Callable[[Exception], None]"

_CLIENT_CLOSED_REQUEST = 499  # nginx's; never sent, but logged
_HTTP_PROBLEMS = {404: "not-found", 405: "method-not-allowed"}


def create_app(
    settings: Settings,
    *,
    load: LoadEngine | None = None,
    on_failure: OnFailure | None = None,
    observers: Sequence[RequestObserver] = (),
    fleet: Fleet | None = None,
    packages: Sequence[Path] | None = None,
    in_flight: c_longlong | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    It listens while its engines are still loading: live at once, ready when they are warm.

    Args:
        settings: all of its configuration.
        load: how an engine package becomes an engine; None: as the settings say.
        on_failure: told when an engine named in `settings` cannot be loaded at start, gRPC's port is
            taken, or an engine is lost and `settings` say to end then.
        observers: told of every inference request.
        fleet: the processes that serve together; None: this one alone.
        packages: the folders of the engine packages to begin with, the default's first; None: those that
            `settings` name.
        in_flight: see `Telemetry`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sampling = Sampling() if settings.otlp_endpoint else None
        telemetry = Telemetry([*observers, *_observers(settings, sampling)], sampling, in_flight)
        registry = Registry(settings, telemetry, load, on_failure if settings.exit_when_lost else None)
        lifecycle = Lifecycle()
        large_work = ThreadPoolExecutor(1, "trimrt-large")
        regions = Regions(enabled=settings.client_shared_memory, largest=settings.max_body_bytes)
        # Looks before what is there is loaded, lest a package come between.
        watcher = (
            Watcher(lambda folder: registry.change(Load(folder)), settings.engine_dir, settings.trust)
            if settings.watch and fleet is None
            else None
        )
        app.state.service = service = Service(
            settings,
            lifecycle,
            BodyMemory(settings.max_body_memory_bytes),
            None if settings.rate_limit is None else RateLimit(settings.rate_limit),
            telemetry,
            registry,
            fleet or Alone(telemetry, registry),
            Metrics(find_devices()),
            large_work,
            regions,
            asyncio.create_task(_load_configured(app, packages, on_failure)),
        )
        grpc = asyncio.create_task(_start_grpc(service, on_failure))
        if fleet is None:
            await grpc
        watching = asyncio.create_task(watcher.run(settings.watch_interval_s)) if watcher else None
        yield
        if watching is not None:
            watching.cancel()
        if (grpc_server := await grpc) is not None:
            await grpc_server.stop(settings.grace_s)
        await service.loading
        await registry.close()
        await asyncio.to_thread(large_work.shutdown)
        regions.close()
        for observer in telemetry.observers:
            await asyncio.to_thread(observer.close)

    app = FastAPI(
        title="TrimRT",
        version=VERSION,
        summary="Image classification by compressed networks.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to an address made of the Host header, which a proxy may have changed
    )
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Server-Timing", "Retry-After", HEADER_LENGTH],
        )
    app.add_middleware(RequestContext)
    # Before a path that has any model's name comes the one that has none.
    routers = (predict, stream, engines, shadows, health, observability, rest_extensions, rest, page, docs)
    for module in routers:
        app.include_router(module.router)
    app.mount("/docs/assets", StaticFiles(directory=str(docs.ASSETS)))
    app.mount("/page", StaticFiles(directory=page.FOLDER))
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(Exception, _internal)
    return app


def _observers(settings: Settings, sampling: Sampling | None) -> list[RequestObserver]:
    observers: list[RequestObserver] = []
    if sampling is not None:
        from server.tracing import Tracer

        observers.append(Tracer(settings.otlp_endpoint, sampling))
    if settings.keep is not None:
        below, share = settings.keep_below, settings.keep_share
        most_bytes = (settings.keep_mib << 20) // settings.workers
        observers.append(Keeper(settings.keep, below=below, share=share, most_bytes=most_bytes))
    return observers


async def _start_grpc(service: Service, on_failure: OnFailure | None) -> Any:
    if service.settings.grpc_port is None:
        return None
    from server.v2 import grpc

    try:
        return await grpc.start(service)
    except OSError as error:
        if on_failure is None:
            raise
        on_failure(error)
        return None


async def _load_configured(
    app: FastAPI, packages: Sequence[Path] | None, on_failure: OnFailure | None
) -> None:
    service = service_of(app)
    try:
        for folder in resolve_engines(service.settings) if packages is None else packages:
            await service.registry.change(Load(folder))
        settle_memory()
        await service.fleet.wait_until_all_loaded()
        service.lifecycle.loaded = True
    except Exception as error:
        log.error("an engine could not be loaded", exc_info=not isinstance(error, EngineError))
        if on_failure is not None:
            on_failure(error)


def _answer(request: Request, problem: Problem) -> Response:
    # Not `request.url`, which cannot be made of every Host header.
    if request.scope["path"].removeprefix(request.scope.get("root_path", "")).startswith("/v2"):
        problem.extra["error"] = problem.detail  # where the Open Inference Protocol has it
    return problem.response()


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _answer(request, error)


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    name = _HTTP_PROBLEMS.get(error.status_code, "malformed-request")
    return _answer(request, Problem(name, str(error.detail), headers=error.headers))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    detail = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return _answer(request, Problem("invalid-parameter", detail))


async def _disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _internal(request: Request, _error: Exception) -> Response:
    return _answer(request, internal_error())
