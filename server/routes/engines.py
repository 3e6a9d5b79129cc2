"""`/engines`: what is there, and, for those who may, loading, unloading and switching."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel

from server.problems import documented
from server.registry import EngineRow, MakeDefault, Unload
from server.service import Managed, Served
from server.small_body import read_small

router = APIRouter(prefix="/engines", tags=["engines"])

EngineName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]


class Engines(BaseModel):
    """What is loaded, and what could be."""

    default: str | None
    engines: list[EngineRow]


class Default(BaseModel):
    """The engine that answers requests which name none."""

    name: str


_MANAGED = documented(400, 401, 403, 404, 409, 422)


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
    default = await read_small(request, Default)
    await service.fleet.change(MakeDefault(default.name))
    return default


@router.post("/{name}/load", responses=_MANAGED)
async def load(service: Managed, name: EngineName) -> EngineRow:
    """Load the newest package of that name from the engine directory, in the place of the running one if any.

    The running one answers what it had admitted; if the package is refused, it runs on.
    """
    return await service.load(name)


@router.post("/{name}/unload", responses=_MANAGED)
async def unload(service: Managed, name: EngineName) -> EngineRow:
    """Answer what the engine had admitted, then free it. The default engine cannot be unloaded."""
    return await service.fleet.change(Unload(name))
