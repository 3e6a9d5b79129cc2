"""`/health/live` and `/health/ready`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.problems import documented

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> dict[str, str]:
    """The process answers; green also while it drains."""
    return {"status": "live"}


@router.get("/ready", responses=documented(503))
async def ready(request: Request) -> dict[str, str]:
    """Every engine named at the start is loaded and warm, and the server is not draining."""
    request.app.state.lifecycle.check_ready()
    manifest = request.app.state.registry.get(None).engine.manifest
    return {
        "status": "ready",
        "engine": manifest.name,
        "version": manifest.version,
        "backend": manifest.backend,
        "precision": manifest.precision,
    }
