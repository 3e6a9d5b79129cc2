"""`POST /predict`: images in, labels out."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.responses import Response

from models.preprocessing import MEDIA_TYPES
from runtime.manifest import Activation
from server.exchange import DEFAULT_TOP_K, PredictCall, answer_over_asgi
from server.problems import documented


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
    cached: bool = Field(description="whether the answer was kept from before (`--cache-mib`)")
    batch_size: int = Field(description="images in the batch it rode in; 0 if cached")
    latency_ms: Latency


class EngineIdentity(BaseModel):
    """Which engine answered."""

    name: str
    version: str
    backend: str
    precision: str
    activation: Activation = Field(
        description="softmax: one label is true, and all probabilities add up to one; sigmoid: any number of "
        "labels may be true, each with a probability of its own"
    )


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
        **dict.fromkeys([*sorted(MEDIA_TYPES), "application/octet-stream"], _BINARY),
    },
}


PARAMETERS = [
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
    openapi_extra={"requestBody": _REQUEST_BODY, "parameters": PARAMETERS},
)
async def predict(request: Request) -> Response:
    """Classify one image (a raw body) or several (multipart field `file`, repeated)."""
    return await answer_over_asgi(request, PredictCall(request.scope, request.state.request_id))
