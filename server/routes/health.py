"""`/health/live` and `/health/ready`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.problems import Problem, documented

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> dict[str, str]:
    """The process answers; green also while it drains."""
    return {"status": "live"}


@router.get("/ready", responses=documented(503))
async def ready(request: Request) -> dict[str, str]:
    """An engine is loaded and warm, and the server is not draining."""
    registry = request.app.state.registry
    if request.app.state.lifecycle.draining:
        raise Problem("not-ready", "the server is draining")
    scheduler = registry.get(None)
    manifest = scheduler.engine.manifest
    return {
        "status": "ready",
        "engine": manifest.name,
        "version": manifest.version,
        "backend": manifest.backend,
        "precision": manifest.precision,
    }
