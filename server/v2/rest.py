"""The protocol over HTTP: JSON tensors, and the binary tensor extension in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, Final, Literal

import orjson
from fastapi import APIRouter, Path, Request
from pydantic import BaseModel
from starlette.responses import Response

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.exchange import HttpAnswer, HttpCall, answer_over_asgi, latency_ms, server_timing
from server.jobs import Result
from server.problems import Problem, documented
from server.registry import Registry
from server.scheduler import Scheduler
from server.service import Served
from server.v2 import core
from server.v2.body import HEADER_LENGTH, InferenceRequest, json_length, parse
from server.v2.regions import Placement, Regions
from server.v2.tensors import InputTensor, OutputTensor
from server.version import VERSION

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

_HEADER_LENGTH: Final = HEADER_LENGTH.lower().encode()
_LARGE_JSON: Final = 64 << 10  # bytes; as many numbers take a millisecond or two
_MOST_NUMBERS: Final = 262_144  # in a JSON answer

ModelName = Annotated[str, Path(max_length=200)]
# As the routes below, for names that need no decoding and no check.
_INFER_PATH: Final = re.compile(rb"/v2/models/([\w.-]{1,200})(?:/versions/([\w.-]+))?/infer", re.ASCII)


class ServerMetadata(BaseModel):
    """The server."""

    name: Literal["trimrt"] = "trimrt"
    version: str = VERSION
    extensions: list[str]


class TensorMetadata(BaseModel):
    """One input or output; dimension -1 is the batch."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """One model, which is a loaded engine."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Whether a model can be asked."""

    name: str
    ready: bool


@router.get("")
async def server_metadata(service: Served) -> ServerMetadata:
    """The server's name, version and extensions."""
    return ServerMetadata(extensions=core.extensions(service.regions))


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready", responses=documented(503))
async def ready(service: Served) -> dict[str, bool]:
    """Every engine named at the start is loaded and warm, and the server is not draining."""
    service.check_ready()
    return {"ready": True}


@router.get("/models/{model}", responses=documented(400, 404, 422))
@router.get("/models/{model}/versions/{version}", responses=documented(400, 404, 422))
async def model_metadata(service: Served, model: ModelName, version: str = "") -> ModelMetadata:
    """A model's inputs and outputs."""
    scheduler = core.find_model(service.registry, model, version)
    return ModelMetadata.model_validate(core.model_metadata(scheduler.engine.manifest))


@router.get("/models/{model}/ready", responses=documented(400, 404, 422))
@router.get("/models/{model}/versions/{version}/ready", responses=documented(400, 404, 422))
async def model_ready(service: Served, model: ModelName, version: str = "") -> ModelReady:
    """Whether the model is loaded."""
    core.find_model(service.registry, model, version)
    return ModelReady(name=model, ready=True)


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema without references, which OpenAPI could not follow into a request body."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}


_SCHEMA: Final = InferenceRequest.model_json_schema()
_INFER: Final[dict[str, Any]] = {
    "response_class": Response,
    "responses": documented(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _inlined(_SCHEMA, _SCHEMA["$defs"])},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
}


@router.post("/models/{model}/infer", **_INFER)
@router.post("/models/{model}/versions/{version}/infer", **_INFER)
async def infer(request: Request, service: Served, model: ModelName, version: str = "") -> Response:
    """Run a model on pixels (`UINT8`) or encoded images (`BYTES`; in JSON, base64)."""
    return await answer_over_asgi(request, InferCall(request.scope, service.regions, model, version))


def infer_call(path: bytes, scope: Mapping[str, Any], regions: Regions) -> InferCall | None:
    """The call that a `POST` to `path` is; None where it is another one, or the routes must look closer."""
    model, version = _model_of(path)
    return InferCall(scope, regions, model, version) if model else None


@lru_cache(maxsize=64)
def _model_of(path: bytes) -> tuple[str, str]:
    """The name and version that `path` has of a model; both empty where the routes must look closer."""
    match = _INFER_PATH.fullmatch(path)
    model, version = match.groups(b"") if match else (b"", b"")
    return model.decode(), version.decode()


class InferCall(HttpCall):
    """One inference request.

    Args:
        scope: see `HttpCall`.
        regions: of shared memory.
        model: the engine's name.
        version: its version; empty for any.
    """

    protocol = "v2-rest"

    def __init__(self, scope: Mapping[str, Any], regions: Regions, model: str, version: str) -> None:
        super().__init__(scope)
        self._regions = regions
        self._model = model
        self._version = version

    def find_engine(self, registry: Registry) -> Scheduler:
        """See `Call`."""
        return core.find_model(registry, self._model, self._version)

    def is_slow_to_read(self, body: bytes) -> bool:
        """See `Call`."""
        return len(body) > _LARGE_JSON and json_length(body, self._header_length()) > _LARGE_JSON

    def read(
        self, body: bytes, registry: Registry, max_images: int
    ) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        """See `Call`."""
        header, tensors = parse(body, self._header_length(), max_images, self._fetch)
        asked = _requested(header, tensors)
        in_json = 0  # outputs, each with a number for every class
        for output in asked.outputs:
            if output.place is not None:
                self._regions.check(self.caller())
            elif not (output.classification or output.binary):
                in_json += 1
        scheduler = self.find_engine(registry)
        manifest = scheduler.engine.manifest
        images = core.images_of(asked, manifest, max_images)
        self._id, self._outputs = asked.id, asked.outputs
        if len(images) * len(manifest.labels) * in_json > _MOST_NUMBERS:
            raise Problem(
                "invalid-parameter",
                f"the answer would have more than {_MOST_NUMBERS:,} numbers in JSON; ask for binary outputs",
            )
        return scheduler, images, core.top_of(asked.outputs)

    def _fetch(self, place: Placement) -> bytes:
        self._regions.check(self.caller())
        data = self._regions.read(place, self.fetched)
        self.fetched += len(data)
        return data

    def _header_length(self) -> str | None:
        length = self._headers.get(_HEADER_LENGTH)
        return None if length is None else length.decode("latin-1")

    def render(self, results: Sequence[Result], manifest: Manifest) -> HttpAnswer:
        """See `Call`."""
        tensors = core.outputs_of(self._outputs, results, manifest.labels)
        answer: dict[str, Any] = {"model_name": manifest.name, "model_version": manifest.version}
        if self._id:
            answer["id"] = self._id
        if cached := core.cached_images(results):
            answer["parameters"] = {"cached_images": cached}
        headers, body = _render(answer, self._outputs, tensors, self._regions)
        timing = server_timing([latency_ms(result) for result in results])
        return 200, {**headers, "Server-Timing": timing}, body

    def refusal(self, problem: Problem) -> HttpAnswer:
        """See `Call`."""
        problem.extra["error"] = problem.detail  # where the protocol has it
        return super().refusal(problem)


def _requested(header: InferenceRequest, tensors: Sequence[InputTensor]) -> core.InferRequest:
    default = header.parameters.binary_data_output
    if header.outputs is None:
        outputs = [core.RequestedOutput(name, binary=default) for name in core.OUTPUTS]
        return core.InferRequest(header.id, tensors, outputs)
    outputs = []
    for output in header.outputs:
        parameters = output.parameters
        place = parameters.place("output", output.name)
        binary = default if parameters.binary_data is None else parameters.binary_data
        outputs.append(core.RequestedOutput(output.name, parameters.classification, binary, place))
    return core.InferRequest(header.id, tensors, outputs)


def _render(
    answer: dict[str, Any],
    asked: Sequence[core.RequestedOutput],
    tensors: Sequence[OutputTensor],
    regions: Regions,
) -> tuple[dict[str, str], bytes]:
    """Headers and body; what goes into shared memory is there then."""
    chunks = []
    answer["outputs"] = rows = []
    for output, tensor in zip(asked, tensors, strict=True):
        row: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if output.place is not None:
            # Without parameters, which Triton's C++ client would take for sizes of binary data.
            regions.write(output.place, tensor.raw())
        elif output.binary:
            chunks.append(tensor.raw())
            row["parameters"] = {"binary_data_size": len(chunks[-1])}
        elif isinstance(tensor.values, list):
            row["data"] = list(chain.from_iterable(tensor.values))
        else:
            row["data"] = tensor.values.ravel()
        rows.append(row)
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not chunks:
        return {"Content-Type": "application/json"}, header
    headers = {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    return headers, b"".join([header, *chunks])
