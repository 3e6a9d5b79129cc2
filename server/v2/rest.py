"""The protocol over HTTP: JSON tensors, and the binary tensor extension in both directions."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
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
from server.v2.tensors import InputTensor, OutputTensor
from server.version import VERSION

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

HEADER_LENGTH: Final = "Inference-Header-Content-Length"

ModelName = Annotated[str, Path(max_length=200)]
# As the routes below, for names that need no decoding and no check.
_INFER_PATH: Final = re.compile(rb"/v2/models/([\w.-]{1,200})(?:/versions/([\w.-]+))?/infer", re.ASCII)


class _Json(BaseModel):
    model_config = ConfigDict(extra="ignore")


class InputParameters(_Json):
    """Of one input."""

    binary_data_size: int | None = Field(default=None, ge=0)


class Input(_Json):
    """An input; `data` is absent when it follows in binary form."""

    name: str
    shape: list[Annotated[int, Field(ge=0)]]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(_Json):
    """Of one requested output."""

    binary_data: bool | None = None
    classification: int = Field(default=0, ge=0)


class Output(_Json):
    """A requested output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(_Json):
    """Of the whole request."""

    binary_data_output: bool = False


class InferenceRequest(_Json):
    """The body of an inference request, or its JSON part."""

    id: str = ""
    parameters: RequestParameters = RequestParameters()
    inputs: list[Input] = Field(min_length=1)
    outputs: list[Output] | None = None


class ServerMetadata(BaseModel):
    """The server."""

    name: Literal["trimrt"] = "trimrt"
    version: str = VERSION
    extensions: list[str] = core.EXTENSIONS


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
async def server_metadata() -> ServerMetadata:
    """The server's name, version and extensions."""
    return ServerMetadata()


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready", responses=documented(503))
async def ready(service: Served) -> dict[str, bool]:
    """Every engine named at the start is loaded and warm, and the server is not draining."""
    service.lifecycle.check_ready()
    return {"ready": True}


@router.get("/models/{model}", responses=documented(404, 422))
@router.get("/models/{model}/versions/{version}", responses=documented(404, 422))
async def model_metadata(service: Served, model: ModelName, version: str = "") -> ModelMetadata:
    """A model's inputs and outputs."""
    scheduler = core.find_model(service.registry, model, version)
    return ModelMetadata.model_validate(core.model_metadata(scheduler.engine.manifest))


@router.get("/models/{model}/ready", responses=documented(404, 422))
@router.get("/models/{model}/versions/{version}/ready", responses=documented(404, 422))
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
async def infer(request: Request, model: ModelName, version: str = "") -> Response:
    """Run a model on pixels (`UINT8`) or encoded images (`BYTES`; in JSON, base64)."""
    return await answer_over_asgi(request, InferCall(request.scope, model, version))


def infer_call(path: bytes, scope: Mapping[str, Any]) -> InferCall | None:
    """The call that a `POST` to `path` is; None where it is another one, or the routes must look closer."""
    match = _INFER_PATH.fullmatch(path)
    return match and InferCall(scope, *(name.decode() for name in match.groups(b"")))


class InferCall(HttpCall):
    """One inference request.

    Args:
        scope: see `HttpCall`.
        model: the engine's name.
        version: its version; empty for any.
    """

    protocol = "v2-rest"

    def __init__(self, scope: Mapping[str, Any], model: str, version: str) -> None:
        super().__init__(scope)
        self._model = model
        self._version = version

    def find_engine(self, registry: Registry) -> Scheduler:
        """See `Call`."""
        return core.find_model(registry, self._model, self._version)

    def read(self, body: bytes, registry: Registry) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        """See `Call`."""
        length = self._headers.get(HEADER_LENGTH.lower().encode())
        self._header, tensors = parse(body, None if length is None else length.decode("latin-1"))
        self._asked = _requested(self._header, tensors)
        scheduler = self.find_engine(registry)
        return scheduler, core.images_of(self._asked, scheduler.engine.manifest), self._asked.top

    def render(self, results: Sequence[Result], manifest: Manifest) -> HttpAnswer:
        """See `Call`."""
        outputs = core.outputs_of(self._asked, results, manifest.labels)
        answer: dict[str, Any] = {"model_name": manifest.name, "model_version": manifest.version}
        if self._asked.id:
            answer["id"] = self._asked.id
        headers, body = _render(answer, outputs, _binary_outputs(self._header))
        timing = server_timing([latency_ms(result) for result in results])
        return 200, {**headers, "Server-Timing": timing}, body

    def refusal(self, problem: Problem) -> HttpAnswer:
        """See `Call`."""
        problem.extra["error"] = problem.detail  # where the protocol has it
        return super().refusal(problem)


def _requested(header: InferenceRequest, tensors: Sequence[InputTensor]) -> core.InferRequest:
    if header.outputs is None:
        return core.InferRequest(header.id, tensors, core.ALL_OUTPUTS)
    outputs = [
        core.RequestedOutput(output.name, output.parameters.classification) for output in header.outputs
    ]
    return core.InferRequest(header.id, tensors, outputs)


def parse(body: bytes, header_length: str | None) -> tuple[InferenceRequest, list[InputTensor]]:
    """A request's JSON part and its tensors.

    Args:
        body: all of it: JSON, then the binary tensors in the order of the inputs that announce one.
        header_length: the header `Inference-Header-Content-Length`: bytes of the JSON part, if not all.

    Raises:
        Problem: `malformed-request`.
    """
    end = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > len(body):
            raise Problem(
                "malformed-request", f"{HEADER_LENGTH} is {header_length!r}; the body has {len(body)} bytes"
            )
        end = int(header_length)
    try:
        # orjson is several times faster than pydantic on long lists of numbers.
        header = InferenceRequest.model_validate(orjson.loads(memoryview(body)[:end]))
    except orjson.JSONDecodeError as error:
        raise Problem("malformed-request", f"the body is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Problem("malformed-request", f"not an inference request: {where}: {first['msg']}") from None
    binary = memoryview(body)[end:]
    tensors = []
    for tensor in header.inputs:
        size = tensor.parameters.binary_data_size
        if size is None:
            tensors.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, _from_json(tensor)))
        elif size > len(binary):
            raise Problem(
                "malformed-request", f"input {tensor.name!r} announces {size} bytes, {len(binary)} are left"
            )
        else:
            tensors.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, binary[:size]))
            binary = binary[size:]
    if binary:
        raise Problem("malformed-request", f"{len(binary)} bytes follow the last tensor")
    return header, tensors


def _from_json(tensor: Input) -> np.ndarray[Any, np.dtype[np.uint8]] | list[bytes]:
    if tensor.data is None:
        raise Problem("malformed-request", f"input {tensor.name!r} has neither data nor binary_data_size")
    if tensor.datatype == "BYTES":
        try:
            return [base64.b64decode(element, validate=True) for element in _flat(tensor.data)]
        except (TypeError, ValueError, binascii.Error):
            raise Problem("malformed-request", "BYTES in JSON must be base64 strings") from None
    try:
        numbers = np.asarray(tensor.data)
    except ValueError:
        numbers = np.empty(0, object)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > 255):
        raise Problem("malformed-request", "UINT8 data must be whole numbers from 0 to 255, in equal rows")
    return numbers.astype(np.uint8).ravel()


def _flat(data: Iterable[Any]) -> Iterable[Any]:
    for element in data:
        if isinstance(element, list):
            yield from _flat(element)
        else:
            yield element


def _binary_outputs(header: InferenceRequest) -> set[str]:
    """Names of the outputs that are to be returned in binary form."""
    default = header.parameters.binary_data_output
    if header.outputs is None:
        return set(core.OUTPUTS) if default else set()
    return {
        output.name
        for output in header.outputs
        if (default if output.parameters.binary_data is None else output.parameters.binary_data)
    }


def _render(
    answer: dict[str, Any], outputs: Sequence[OutputTensor], binary: set[str]
) -> tuple[dict[str, str], bytes]:
    """Headers and body."""
    chunks = []
    answer["outputs"] = rows = []
    for output in outputs:
        row: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if output.name in binary:
            chunks.append(output.raw())
            row["parameters"] = {"binary_data_size": len(chunks[-1])}
        elif isinstance(output.values, list):
            row["data"] = [element.decode() for line in output.values for element in line]
        else:
            row["data"] = output.values.ravel()
        rows.append(row)
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not chunks:
        return {"Content-Type": "application/json"}, header
    headers = {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    return headers, b"".join([header, *chunks])
