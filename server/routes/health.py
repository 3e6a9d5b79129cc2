"""`/health/live` and `/health/ready`."""

from __future__ import annotations

from fastapi import APIRouter

from server.problems import documented
from server.service import Served

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> dict[str, str]:
    """The process answers; green also while it drains."""
    return {"status": "live"}


@router.get("/ready", responses=documented(503))
async def ready(service: Served) -> dict[str, str]:
    """Every engine named at the start is loaded, warm and works, and the server is not draining."""
    service.check_ready()
    manifest = service.registry.get(None).engine.manifest
    return {
        "status": "ready",
        "engine": manifest.name,
        "version": manifest.version,
        "backend": manifest.backend,
        "precision": manifest.precision,
    }
