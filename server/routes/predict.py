"""`POST /predict`: images in, labels out."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.responses import Response

from models.preprocessing import MEDIA_TYPES
from server.auth import require_key
from server.bodies import CancelOnDisconnect, Part, parse_multipart, read_body
from server.manifest import Manifest
from server.problems import Problem, documented
from server.scheduler import Result
from server.settings import Settings

DEFAULT_TOP_K = 5


class Prediction(BaseModel):
    """One label."""

    label: str
    index: int
    probability: float = Field(ge=0, le=1)


class Latency(BaseModel):
    """Milliseconds, by stage. `queue` is all the waiting; `total` runs from admission to the result.

    On a GPU, `h2d`, `compute` and `d2h` are the parts of `inference` that CUDA events measured.
    """

    decode: float
    queue: float
    inference: float
    total: float
    h2d: float | None = None
    compute: float | None = None
    d2h: float | None = None


class ImageResult(BaseModel):
    """One image's answer."""

    filename: str | None
    predictions: list[Prediction]
    batch_size: int = Field(description="images in the batch it rode in")
    latency_ms: Latency


class EngineIdentity(BaseModel):
    """Which engine answered."""

    name: str
    version: str
    backend: str
    precision: str


class PredictResponse(BaseModel):
    """The answer to one request, images in the order they came."""

    request_id: str
    engine: EngineIdentity
    results: list[ImageResult]


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "string", "format": "binary"},
                        "description": "one or many encoded images",
                    }
                },
            }
        },
        **dict.fromkeys(sorted(MEDIA_TYPES), _BINARY),
    },
}


_PARAMETERS = [
    {
        "name": "engine",
        "in": "query",
        "schema": {"type": "string"},
        "description": "engine to ask; the default one if absent",
    },
    {
        "name": "top_k",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1},
        "description": f"labels per image; {DEFAULT_TOP_K}, or all of fewer, if absent",
    },
]


class _DirectRoute(APIRoute):
    """Calls its endpoint with the request alone: FastAPI's parameters cost 0.1 ms of CPU each time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `fastapi.routing.APIRoute`."""
        return self.endpoint


router = APIRouter(tags=["inference"], route_class=_DirectRoute)


@router.post(
    "/predict",
    response_class=Response,
    responses={
        200: {"model": PredictResponse},
        **documented(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={"requestBody": _REQUEST_BODY, "parameters": _PARAMETERS},
)
async def predict(request: Request) -> Response:
    """Classify one image (a raw `image/*` body) or several (multipart field `file`, repeated)."""
    state = request.app.state
    settings: Settings = state.settings
    with (
        state.telemetry.request("predict", request.headers) as observed,
        state.body_memory.share() as take,
    ):
        state.lifecycle.check_serving()
        if settings.protect_predict:
            require_key(request, settings.api_key)
        engine = request.query_params.get("engine")
        deadline = time.monotonic() + request_timeout(request.headers.get("x-request-timeout-ms"), settings)
        # Turned away before the body is read, an overload costs little.
        state.registry.get(engine).check_room()
        images = await _read_images(request, settings, deadline - time.monotonic(), take)
        # Engines may have been switched meanwhile. From here to the admission nothing else runs.
        scheduler = state.registry.get(engine)
        observed.manifest = manifest = scheduler.engine.manifest
        count = _top_k(request.query_params.get("top_k"), len(manifest.labels))
        with CancelOnDisconnect(request.receive):
            observed.results = results = await scheduler.infer(
                [image.data for image in images], deadline - time.monotonic()
            )
        return _answer(request.state.request_id, manifest, images, results, count)


def _top_k(value: str | None, classes: int) -> int:
    if value is None:
        return min(DEFAULT_TOP_K, classes)
    if not (value.isascii() and value.isdecimal() and 1 <= int(value[:9]) <= classes):
        raise Problem(
            "invalid-parameter", f"top_k must be a whole number from 1 to {classes}, not {value[:40]!r}"
        )
    return int(value)


def request_timeout(header: str | None, settings: Settings) -> float:
    """How long a request may take, seconds: what it asks for in milliseconds, up to the server's maximum.

    Raises:
        Problem: `invalid-parameter`.
    """
    if header is None:
        return settings.timeout_ms / 1000
    try:
        asked = float(header)
    except ValueError:
        asked = float("nan")
    if not asked > 0:
        raise Problem("invalid-parameter", f"X-Request-Timeout-Ms must be a positive number, not {header!r}")
    return min(asked, settings.timeout_ms) / 1000


async def _read_images(
    request: Request, settings: Settings, timeout: float, take: Callable[[int], None]
) -> Sequence[Part]:
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES and media_type != "multipart/form-data":
        raise Problem(
            "unsupported-media-type",
            f"Content-Type is {media_type or 'missing'!r}; "
            "send multipart/form-data with a field `file`, or one of " + ", ".join(sorted(MEDIA_TYPES)),
        )
    body = await read_body(request, settings.max_body_bytes, timeout, take)
    if media_type != "multipart/form-data":
        return [Part("file", None, body)]
    images = [part for part in parse_multipart(content_type, body) if part.name == "file"]
    if not images:
        raise Problem("invalid-parameter", "the form has no field `file`")
    if len(images) > settings.max_images:
        raise Problem("too-many-images", f"{len(images)} images; the limit is {settings.max_images}")
    return images


def _answer(
    request_id: str, manifest: Manifest, images: Sequence[Part], results: Sequence[Result], top_k: int
) -> Response:
    body: dict[str, Any] = {
        "request_id": request_id,
        "engine": {
            "name": manifest.name,
            "version": manifest.version,
            "backend": manifest.backend,
            "precision": manifest.precision,
        },
        "results": [
            {
                "filename": image.filename,
                "predictions": _predictions(result, manifest.labels, top_k),
                "batch_size": result.batch_size,
                "latency_ms": {
                    "decode": round(result.decode * 1000, 3),
                    "queue": round(result.queue * 1000, 3),
                    "inference": round(result.inference * 1000, 3),
                    "total": round(result.total * 1000, 3),
                    **{stage: round(seconds * 1000, 3) for stage, seconds in result.device.items()},
                },
            }
            for image, result in zip(images, results, strict=True)
        ],
    }
    return Response(
        orjson.dumps(body), headers={"Server-Timing": server_timing(results)}, media_type="application/json"
    )


def _predictions(result: Result, labels: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    order = result.order[:top_k]
    return [
        {"label": labels[index], "index": index, "probability": probability}
        for index, probability in zip(order.tolist(), result.probabilities[order].tolist(), strict=True)
    ]


def server_timing(results: Sequence[Result]) -> str:
    """The `Server-Timing` header: the slowest image's stages, milliseconds."""
    slowest = max(results, key=lambda result: result.total)
    stages = {stage: getattr(slowest, stage) for stage in ("decode", "queue", "inference", "total")}
    return ", ".join(
        f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in (stages | dict(slowest.device)).items()
    )
