"""`/metrics` for Prometheus, `/stats` for people and pages."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.problems import documented
from server.scheduler import Scheduler
from server.service import Served
from server.stats import PERCENTILES, WINDOW_S, EngineStats, Histogram
from server.version import VERSION

router = APIRouter(tags=["observability"])


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Prometheus's text format."""
    return Response(await service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats", responses=documented(422))
async def stats(
    service: Served,
    window_s: Annotated[int, Query(ge=1, le=WINDOW_S, description="length of `recent`, seconds")] = WINDOW_S,
) -> dict[str, Any]:
    """Percentiles of every stage in milliseconds, since start and lately, and how requests ended."""
    telemetry, registry = service.telemetry, service.registry
    return {
        "version": VERSION,
        "uptime_s": round(time.time() - telemetry.started, 1),
        "in_flight": telemetry.in_flight,
        "requests": [{**key._asdict(), "count": count} for key, count in telemetry.requests.items()],
        "default": registry.default,
        "window_s": window_s,
        "engines": [
            {**key._asdict(), **_loaded(registry.loaded.get(key.engine)), **_engine(engine, window_s)}
            for key, engine in telemetry.engines.items()
        ],
    }


def _loaded(scheduler: Scheduler | None) -> dict[str, Any]:
    if scheduler is None:
        return {"loaded": False}
    return {"loaded": True, "pending": scheduler.pending, "queue_limit": scheduler.queue_limit}


def _engine(stats: EngineStats, window_s: int) -> dict[str, Any]:
    stages = stats.stages.items()
    batches = sum(stats.batches.values())
    return {
        "batches": batches,
        "mean_batch_size": sum(size * n for size, n in stats.batches.items()) / batches if batches else None,
        "dropped": stats.dropped,
        "failed": stats.failed,
        "since_start": _stages({stage: distribution.total for stage, distribution in stages}),
        "recent": _stages({stage: distribution.recent(window_s) for stage, distribution in stages}),
    }


def _stages(histograms: dict[str, Histogram]) -> dict[str, Any]:
    return {
        "images": histograms["total"].count,
        "latency_ms": {stage: _percentiles(histogram) for stage, histogram in histograms.items()},
    }


def _percentiles(histogram: Histogram) -> dict[str, float | None]:
    values = {name: histogram.percentile(percent) for name, percent in PERCENTILES.items()}
    values["mean"] = histogram.sum / histogram.count if histogram.count else None
    return {name: None if value is None else round(value * 1000, 3) for name, value in values.items()}
