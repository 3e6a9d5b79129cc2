"""`/metrics` for Prometheus, `/stats` for people and pages."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from runtime.histogram import WINDOW_S, Histogram
from server.counts import Compared, Queue
from server.predictions import Predictions
from server.problems import documented
from server.service import Served
from server.stats import PERCENTILES, EngineStats
from server.version import VERSION

router = APIRouter(tags=["observability"])


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Prometheus's text format."""
    return Response(
        await service.metrics.render(await service.fleet.counts()), media_type=CONTENT_TYPE_LATEST
    )


@router.get("/stats", responses=documented(422))
async def stats(
    service: Served,
    window_s: Annotated[int, Query(ge=1, le=WINDOW_S, description="length of `recent`, seconds")] = WINDOW_S,
) -> dict[str, Any]:
    """Percentiles of every stage in milliseconds, since start and lately, and how requests ended."""
    counts = await service.fleet.counts()
    return {
        "version": VERSION,
        "uptime_s": round(time.time() - counts.started, 1),
        "workers": {
            "running": len(counts.processes),
            "replaced": counts.replaced,
            "lost_requests": counts.lost,
        },
        "in_flight": counts.in_flight,
        "requests": [{**key._asdict(), "count": count} for key, count in counts.requests.items()],
        "default": counts.default,
        "cache": counts.cache and counts.cache._asdict(),
        "window_s": window_s,
        "engines": [
            {
                **key._asdict(),
                **_loaded(counts.queues.get(key)),
                **_engine(engine, window_s),
                "shadow": _shadow(counts.shadows.get(key)),
            }
            for key, engine in counts.engines.items()
        ],
    }


def _loaded(queue: Queue | None) -> dict[str, Any]:
    if queue is None:
        return {"loaded": False}
    return {"loaded": True, "pending": queue.pending, "queue_limit": queue.limit}


def _engine(stats: EngineStats, window_s: int) -> dict[str, Any]:
    stages = stats.stages.items()
    batches = sum(stats.batches.values())
    return {
        "batches": batches,
        "mean_batch_size": sum(size * n for size, n in stats.batches.items()) / batches if batches else None,
        "dropped": stats.dropped,
        "failed": stats.failed,
        "cache": {"hits": stats.hits, "misses": stats.misses},
        "predictions": stats.predictions and _predictions(stats.predictions),
        "since_start": _stages({stage: distribution.total for stage, distribution in stages}),
        "recent": _stages({stage: distribution.recent(window_s) for stage, distribution in stages}),
    }


def _predictions(predictions: Predictions) -> dict[str, Any]:
    images = predictions.images
    return {
        "images": images,
        "labels": predictions.by_label(),
        "mean_confidence": round(predictions.sum / images, 6) if images else None,
        "drift": {of: round(index, 4) for of, index in predictions.drift().items()},
    }


def _shadow(compared: Compared | None) -> dict[str, Any] | None:
    if compared is None:
        return None
    of, share, counts = compared
    images = counts.compared or None
    primary, candidate = counts.inference
    return {
        "of": of,
        "share": share,
        "images": counts.compared,
        "waiting": counts.waiting,
        "dropped": counts.dropped,
        "failed": counts.failed,
        "agreement": round(counts.agreement, 6) if images or counts.failed else None,
        "mean_difference": images and round(counts.difference / images, 6),
        "inference_ms": _percentiles(candidate),
        "inference_of_ms": _percentiles(primary),
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
