"""Triton's extensions over HTTP; `extensions` and `regions` say what they mean."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, ConfigDict, RootModel

from server.auth import Caller
from server.problems import Problem, documented
from server.service import Managed, Served, Service
from server.small_body import read_small
from server.v2 import core, extensions
from server.v2.rest import ModelName

router = APIRouter(prefix="/v2", tags=["triton's extensions"])

RegionName = Annotated[str, Path(max_length=200)]
_READ = documented(400, 404, 422)
_MANAGED = documented(400, 401, 403, 404, 408, 409, 413, 422, 501)


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class IndexRequest(_Lenient):
    """Which models are asked for."""

    ready: bool = False


class ModelRequest(_Lenient):
    """How a model is to be loaded or unloaded."""

    parameters: dict[str, Any] = {}


class RegisterRequest(_Lenient):
    """A region of an object in shared memory, in bytes."""

    key: str
    offset: int = 0
    byte_size: int


class Changes(RootModel[dict[str, Any]]):
    """Settings by name."""


# --- what a model is and did ----------------------------------------------------------------------------


@router.get("/models/{model}/config", responses=_READ)
@router.get("/models/{model}/versions/{version}/config", responses=_READ)
async def model_config(service: Served, model: ModelName, version: str = "") -> dict[str, Any]:
    """The model's configuration, as Triton describes one."""
    return extensions.model_config(service, model, version)


@router.get("/models/stats", responses=_READ)
@router.get("/models/{model}/stats", responses=_READ)
@router.get("/models/{model}/versions/{version}/stats", responses=_READ)
async def statistics(service: Served, model: str = "", version: str = "") -> dict[str, Any]:
    """Counts and durations of a model, or of all."""
    return await extensions.statistics(service, model, version)


# --- the model repository -------------------------------------------------------------------------------


@router.post("/repository/index", responses=documented(408, 413, 422))
async def repository_index(service: Served, request: Request) -> list[dict[str, str]]:
    """Every engine that is loaded or could be."""
    asked = await read_small(request, IndexRequest, empty=b"{}")
    return await extensions.repository_index(service, ready=asked.ready)


@router.post("/repository/models/{model}/load", responses=_MANAGED)
async def load(service: Managed, request: Request, model: ModelName) -> dict[str, str]:
    """As `POST /engines/{name}/load`."""
    asked = await read_small(request, ModelRequest, empty=b"{}")
    await extensions.load_model(service, model, asked.parameters)
    return {}


@router.post("/repository/models/{model}/unload", responses=_MANAGED)
async def unload(service: Managed, request: Request, model: ModelName) -> dict[str, str]:
    """As `POST /engines/{name}/unload`."""
    await read_small(request, ModelRequest, empty=b"{}")
    await extensions.unload_model(service, model)
    return {}


# --- logs and traces ------------------------------------------------------------------------------------


@router.get("/logging")
async def log_settings(service: Served) -> dict[str, Any]:
    """Which levels of the log are written."""
    return extensions.log_settings(service, {})


@router.post("/logging", responses=_MANAGED)
async def update_log_settings(service: Managed, request: Request) -> dict[str, Any]:
    """Change which levels of the log are written."""
    changes = await read_small(request, Changes)
    return extensions.log_settings(service, changes.root)


@router.get("/trace/setting", responses=_READ)
@router.get("/models/{model}/trace/setting", responses=_READ)
async def trace_settings(service: Served, model: str = "") -> dict[str, Any]:
    """Which requests leave a trace."""
    return extensions.trace_settings(service, model, {})


@router.post("/trace/setting", responses=_MANAGED)
@router.post("/models/{model}/trace/setting", responses=_MANAGED)
async def update_trace_settings(service: Managed, request: Request, model: str = "") -> dict[str, Any]:
    """Change which requests leave a trace."""
    changes = await read_small(request, Changes)
    return extensions.trace_settings(service, model, changes.root)


# --- shared memory --------------------------------------------------------------------------------------


def _local(request: Request, service: Managed) -> Service:
    service.regions.check(Caller.over_http(request.scope))
    return service


Local = Annotated[Service, Depends(_local)]  # for programs on this machine that may manage the server


@router.get("/systemsharedmemory/status", responses=_MANAGED)
@router.get("/systemsharedmemory/region/{region}/status", responses=_MANAGED)
async def region_status(service: Local, region: str = "") -> list[dict[str, str | int]]:
    """The registered regions."""
    return list(service.regions.status(region).values())


@router.post("/systemsharedmemory/region/{region}/register", responses=_MANAGED)
async def register_region(service: Local, request: Request, region: RegionName) -> dict[str, str]:
    """Register a region of an object in shared memory."""
    asked = await read_small(request, RegisterRequest)
    service.regions.register(region, asked.key, asked.offset, asked.byte_size)
    return {}


@router.post("/systemsharedmemory/unregister", responses=_MANAGED)
@router.post("/systemsharedmemory/region/{region}/unregister", responses=_MANAGED)
async def unregister_region(service: Local, region: str = "") -> dict[str, str]:
    """Forget a region, or all."""
    service.regions.unregister(region)
    return {}


@router.get("/cudasharedmemory/status", responses=documented(400, 501))
@router.get("/cudasharedmemory/region/{region}/status", responses=documented(400, 501))
@router.post("/cudasharedmemory/region/{region}/register", responses=documented(400, 501))
@router.post("/cudasharedmemory/unregister", responses=documented(400, 501))
@router.post("/cudasharedmemory/region/{region}/unregister", responses=documented(400, 501))
async def cuda_shared_memory(region: str = "") -> None:  # noqa: ARG001 - OpenAPI tells of it
    """Refused: CUDA's shared memory is not supported."""
    raise Problem("not-supported", core.NO_CUDA_MEMORY)
