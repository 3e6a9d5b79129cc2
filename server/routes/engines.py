"""`/engines`: what is there."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

router = APIRouter(prefix="/engines", tags=["engines"])


@router.get("")
async def list_engines(request: Request) -> dict[str, Any]:
    """Every engine that is loaded, or that lies in the engine directory."""
    registry = request.app.state.registry
    return {"default": registry.default, "engines": registry.describe()}
