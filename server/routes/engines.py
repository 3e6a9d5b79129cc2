"""`/engines`: what is there, and, for those who may, loading, unloading and switching."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, ValidationError

from runtime.manifest import EngineError
from server.auth import Caller, require_key
from server.bodies import body_too_large
from server.problems import Problem, documented
from server.registry import EngineRow, Load, MakeDefault, Unload, readable
from server.service import Served, Service

router = APIRouter(prefix="/engines", tags=["engines"])

EngineName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]


class Engines(BaseModel):
    """What is loaded, and what could be."""

    default: str | None
    engines: list[EngineRow]


class Default(BaseModel):
    """The engine that answers requests which name none."""

    name: str


def _managed(request: Request, service: Served) -> Service:
    require_key(Caller.over_http(request.scope), service.settings)
    return service


Managed = Annotated[Service, Depends(_managed)]
_MANAGED = documented(400, 401, 403, 404, 409, 422)
_MOST_BYTES: Final = 4096  # of a body
_BODY_S: Final = 5.0


@router.get("")
async def list_engines(service: Served) -> Engines:
    """Every engine that is loaded, or that lies in the engine directory."""
    return Engines(default=service.registry.default, engines=await service.registry.describe())


@router.put(
    "/default",
    responses=_MANAGED | documented(408, 413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Default"}}},
        }
    },
)
async def set_default(service: Managed, request: Request) -> Default:
    """Make a loaded engine the default. Requests already admitted stay where they are."""
    # FastAPI would read a body of any size before it asks who calls.
    try:
        body = await asyncio.wait_for(_small_body(request), _BODY_S)
        default = Default.model_validate_json(body)
    except asyncio.TimeoutError:  # not `TimeoutError`: Python 3.10 has two
        raise Problem("body-timeout", f"the body had not arrived after {_BODY_S:g} s") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["body", *map(str, first["loc"])])
        raise Problem("invalid-parameter", f"{where}: {first['msg']}") from None
    await service.fleet.change(MakeDefault(default.name))
    return default


async def _small_body(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_BYTES:
            raise body_too_large(_MOST_BYTES)
    return body


@router.post("/{name}/load", responses=_MANAGED)
async def load(service: Managed, name: EngineName) -> EngineRow:
    """Load the newest package of that name from the engine directory, in the place of the running one if any.

    The running one answers what it had admitted; if the package is refused, it runs on.
    """
    folder = await service.registry.find(name)
    try:
        return await service.fleet.change(Load(folder))
    except EngineError as error:
        raise Problem("engine-refused", readable(str(error))) from None


@router.post("/{name}/unload", responses=_MANAGED)
async def unload(service: Managed, name: EngineName) -> EngineRow:
    """Answer what the engine had admitted, then free it. The default engine cannot be unloaded."""
    return await service.fleet.change(Unload(name))
