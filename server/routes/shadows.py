"""`/engines/{name}/shadow` and `/engines/{name}/promote`: a candidate on live traffic, and its promotion."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from server.problems import documented
from server.registry import EngineRow, MakeDefault
from server.routes.engines import EngineName
from server.service import Managed
from server.shadow import Rule
from server.small_body import read_small

router = APIRouter(prefix="/engines", tags=["engines"])

_MANAGED = documented(400, 401, 403, 404, 408, 409, 413, 422, 501)


class ShadowRequest(BaseModel):
    """Whose images the engine is to be tried on."""

    model_config = ConfigDict(extra="forbid")

    of: str
    share: float = Field(default=0.1, gt=0, le=1)


class ShadowRow(ShadowRequest):
    """A shadow."""

    name: str


@router.put("/{name}/shadow", responses=_MANAGED)
async def set_shadow(service: Managed, request: Request, name: EngineName) -> ShadowRow:
    """Run a loaded engine on a share of another's images, after they are answered, to compare the two."""
    asked = await read_small(request, ShadowRequest)
    service.registry.set_shadow(name, asked.of, asked.share)
    return ShadowRow(name=name, of=asked.of, share=asked.share)


@router.delete("/{name}/shadow", responses=_MANAGED)
async def end_shadow(service: Managed, name: EngineName) -> dict[str, str]:
    """Compare no more, and forget what was counted."""
    service.registry.end_shadow(name)
    return {}


@router.post("/{name}/promote", responses=_MANAGED)
async def promote(service: Managed, request: Request, name: EngineName) -> EngineRow:
    """Make a shadow the default engine, if it has proved itself: the body is the rule."""
    rule = await read_small(request, Rule, empty=b"{}")
    shadow = service.registry.shadow(name)
    rule.check(shadow)
    row = await service.fleet.change(MakeDefault(name))
    service.registry.end_shadow(name)
    return row
