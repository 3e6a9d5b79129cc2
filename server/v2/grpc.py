"""The protocol over gRPC. Only imported when `--grpc-port` is set; needs the extra `grpc`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, cast
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.admission import Admission, Call
from server.auth import Caller
from server.jobs import Result
from server.problems import Problem
from server.registry import Registry
from server.scheduler import Scheduler
from server.service import Service
from server.v2 import core
from server.v2 import inference_pb2 as pb
from server.v2.tensors import InputTensor
from server.version import VERSION

log = logging.getLogger("trimrt.grpc")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_CODES: Final = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


async def start(service: Service) -> grpc.aio.Server:
    """Serve the application's engines on `settings.grpc_port`, in the running event loop.

    Raises:
        RuntimeError: the port is taken.
    """
    settings = service.settings
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", settings.max_body_bytes), ("grpc.so_reuseport", 0)]
    )
    server.add_generic_rpc_handlers((_Methods(service).handler(),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    await server.start()
    log.info("listening", extra={"grpc": f"{host}:{port}"})
    return server


class _Methods:
    """`inference.GRPCInferenceService`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def handler(self) -> grpc.GenericRpcHandler:
        """Every method, without generated service code."""
        handlers = {}
        for method in (
            self.server_live,
            self.server_ready,
            self.model_ready,
            self.server_metadata,
            self.model_metadata,
            self.model_infer,
        ):
            name = "".join(word.capitalize() for word in method.__name__.split("_"))
            admitted = name == "ModelInfer"  # and only then parsed
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                _with_status(method),
                request_deserializer=None if admitted else getattr(pb, f"{name}Request").FromString,
                response_serializer=getattr(pb, f"{name}Response").SerializeToString,
            )
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)

    async def server_live(self, _request: pb.ServerLiveRequest, _context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(
        self, _request: pb.ServerReadyRequest, _context: Context
    ) -> pb.ServerReadyResponse:
        lifecycle = self._service.lifecycle
        return pb.ServerReadyResponse(ready=lifecycle.loaded and not lifecycle.draining)

    async def model_ready(self, request: pb.ModelReadyRequest, _context: Context) -> pb.ModelReadyResponse:
        core.find_model(self._service.registry, request.name, request.version)
        return pb.ModelReadyResponse(ready=True)

    async def server_metadata(
        self, _request: pb.ServerMetadataRequest, _context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="trimrt", version=VERSION, extensions=core.EXTENSIONS)

    async def model_metadata(
        self, request: pb.ModelMetadataRequest, _context: Context
    ) -> pb.ModelMetadataResponse:
        scheduler = core.find_model(self._service.registry, request.name, request.version)
        return pb.ModelMetadataResponse(**core.model_metadata(scheduler.engine.manifest))

    async def model_infer(self, body: bytes, context: Context) -> pb.ModelInferResponse:
        answered: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()

        def respond(answer: _Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        admission = Admission(self._service, _Infer(context), respond)
        try:
            admission.open()
            admission.receive(body)
            admission.complete()
            answer = await answered
        finally:
            admission.abandon()  # a client that leaves, or whose deadline passes, cancels this coroutine
        if isinstance(answer, Problem):
            raise answer
        return answer


_Answer: TypeAlias = "pb.ModelInferResponse | Problem"


class _Infer(Call[_Answer]):
    """One inference request."""

    protocol = "v2-grpc"

    def __init__(self, context: Context) -> None:
        self._context = context

    def caller(self) -> Caller:
        metadata = {
            name: value if isinstance(value, str) else value.decode("latin-1")
            for name, value in self._context.invocation_metadata() or ()
        }
        return Caller(address_of(self._context.peer()), metadata, scheme=None)

    def timeout(self) -> float | None:
        return cast("float | None", self._context.time_remaining())

    def read(self, body: bytes, registry: Registry) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        try:
            request = pb.ModelInferRequest.FromString(body)
        except DecodeError as error:
            raise Problem("malformed-request", f"not a ModelInferRequest: {error}") from None
        scheduler = core.find_model(registry, request.model_name, request.model_version)
        self._asked = _requested(request)
        return scheduler, core.images_of(self._asked, scheduler.engine.manifest), self._asked.top

    def render(self, results: Sequence[Result], manifest: Manifest) -> _Answer:
        outputs = core.outputs_of(self._asked, results, manifest.labels)
        return pb.ModelInferResponse(
            model_name=manifest.name,
            model_version=manifest.version,
            id=self._asked.id,
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(
                    name=output.name, datatype=output.datatype, shape=output.shape
                )
                for output in outputs
            ],
            raw_output_contents=[output.raw() for output in outputs],
        )

    def refusal(self, problem: Problem) -> _Answer:
        return problem


def address_of(peer: str) -> str:
    """The IP address in gRPC's peer, like `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def _requested(request: pb.ModelInferRequest) -> core.InferRequest:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Problem("malformed-request", f"{len(request.inputs)} inputs, but {len(raw)} raw contents")
    inputs = [
        InputTensor(tensor.name, tensor.datatype, tensor.shape, raw[number] if raw else _contents(tensor))
        for number, tensor in enumerate(request.inputs)
    ]
    outputs = [
        core.RequestedOutput(output.name, output.parameters["classification"].int64_param)
        for output in request.outputs
    ]
    return core.InferRequest(request.id, inputs, outputs or core.ALL_OUTPUTS)


def _contents(tensor: pb.ModelInferRequest.InferInputTensor) -> Any:
    if tensor.datatype == "BYTES":
        return list(tensor.contents.bytes_contents)
    numbers = np.fromiter(tensor.contents.uint_contents, np.uint32)
    if numbers.size and numbers.max() > 255:
        raise Problem("malformed-request", "UINT8 contents must be from 0 to 255")
    return numbers.astype(np.uint8)


def _with_status(
    method: Callable[[Any, Context], Awaitable[Any]],
) -> Callable[[Any, Context], Awaitable[Any]]:
    """`method`, with its problems answered as gRPC statuses."""

    async def handle(request: Any, context: Context) -> Any:
        try:
            return await method(request, context)
        except Problem as problem:
            code = _CODES.get(problem.status, grpc.StatusCode.INVALID_ARGUMENT)
            await context.abort(code, problem.detail)
        except Exception:
            log.exception("a gRPC request failed")
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed; its log says why")

    return handle
