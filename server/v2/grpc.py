"""The protocol over gRPC. Only imported when `--grpc-port` is set; needs the extra `grpc`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast
from urllib.parse import unquote

# What gRPC has to say comes as exceptions too; its lines on standard error are not the log's.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf.message import DecodeError

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.admission import Admission, Call
from server.auth import Caller
from server.bodies import body_too_large, too_many_images
from server.jobs import Result
from server.problems import Problem, internal_error
from server.registry import Registry
from server.scheduler import Scheduler
from server.service import Service
from server.v2 import core
from server.v2 import inference_pb2 as pb
from server.v2.intake import Intake
from server.v2.tensors import InputTensor
from server.v2.wire import check_size
from server.version import VERSION

log = logging.getLogger("trimrt.grpc")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Message = TypeVar("Message", covariant=True)

_MOST_CALLS: Final = 1_024  # at once; beyond it, RESOURCE_EXHAUSTED
_LARGE_REQUEST: Final = 256 << 10  # bytes; as many take a few milliseconds to parse
# Of `ModelInferRequest`, see `wire`: inputs with their contents' bytes_contents, outputs, raw_input_contents.
_REQUEST: Final[dict[int, Any]] = {5: {5: {8: None}}, 6: {}, 7: None}

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

    Where several processes share the port, this one begins when its engines are loaded.

    Raises:
        OSError: the port is taken.
    """
    settings = service.settings
    if settings.workers > 1:
        await service.loading
    intake = Intake(service.body_memory, settings.max_body_bytes)
    server = grpc.aio.server(
        options=[
            # What nobody has asked to read yet waits with the client.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 64 << 10),
            ("grpc.experimental.tcp_max_read_chunk_size", 64 << 10),
            ("grpc.max_receive_message_length", intake.largest),
            ("grpc.max_concurrent_streams", max(128, settings.queue_limit)),  # of one connection
            ("grpc.so_reuseport", int(settings.workers > 1)),
        ],
        maximum_concurrent_rpcs=_MOST_CALLS,
    )
    server.add_generic_rpc_handlers((_Methods(service, intake).handler(),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError:
        raise OSError(
            f"cannot listen on {settings.host} port {settings.grpc_port} for gRPC; "
            "choose another with --grpc-port"
        ) from None
    await server.start()
    if settings.workers == 1:  # several have one who says so for all
        log.info("listening", extra={"grpc": f"{host}:{port}"})
    return server


class _Methods:
    """`inference.GRPCInferenceService`."""

    def __init__(self, service: Service, intake: Intake) -> None:
        self._service = service
        self._intake = intake

    def handler(self) -> grpc.GenericRpcHandler:
        """Every method, without generated service code.

        Registered as taking streams, so that a method itself reads its message, when it is time, or not at
        all. To a client that makes no difference.
        """
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
            handlers[name] = grpc.stream_unary_rpc_method_handler(
                _with_status(method),
                response_serializer=getattr(pb, f"{name}Response").SerializeToString,
            )
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)

    async def server_live(self, _context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _context: Context) -> pb.ServerReadyResponse:
        try:
            self._service.check_ready()
        except Problem:
            return pb.ServerReadyResponse(ready=False)
        return pb.ServerReadyResponse(ready=True)

    async def model_ready(self, context: Context) -> pb.ModelReadyResponse:
        request = _parsed(pb.ModelReadyRequest, await self._read_small(context))
        try:
            core.find_model(self._service.registry, request.name, request.version)
        except Problem:  # to be asked that is what the method is for
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def server_metadata(self, _context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="trimrt", version=VERSION, extensions=core.EXTENSIONS)

    async def model_metadata(self, context: Context) -> pb.ModelMetadataResponse:
        request = _parsed(pb.ModelMetadataRequest, await self._read_small(context))
        _check_texts(request.name, request.version)
        scheduler = core.find_model(self._service.registry, request.name, request.version)
        return pb.ModelMetadataResponse(**core.model_metadata(scheduler.engine.manifest))

    async def _read_small(self, context: Context) -> bytes:
        message = await self._intake.receive(context.read)
        if len(message) > _LARGE_REQUEST:
            raise body_too_large(_LARGE_REQUEST)
        return message

    async def model_infer(self, context: Context) -> pb.ModelInferResponse:
        answered: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()

        def respond(answer: _Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        admission = Admission(self._service, _Infer(context), respond)
        admission.open()
        carrier = asyncio.create_task(self._carry(context, admission, answered))
        try:
            answer = await answered
        finally:
            carrier.cancel()
            admission.abandon()  # a client that leaves, or whose deadline passes, cancels this coroutine
        if isinstance(answer, Problem):
            raise answer
        return answer

    async def _carry(
        self, context: Context, admission: Admission[_Answer], answered: asyncio.Future[_Answer]
    ) -> None:
        """Hand the message over."""
        if answered.done():
            return
        try:
            admission.receive(await self._intake.receive(context.read))
        except Problem as problem:
            admission.refuse(problem)
        else:
            admission.complete()


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

    def priority(self) -> str | None:
        return self.caller().headers.get("x-priority")

    def is_slow_to_read(self, body: bytes) -> bool:
        return len(body) > _LARGE_REQUEST

    def read(
        self, body: bytes, registry: Registry, max_images: int
    ) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        check_size(memoryview(body), _REQUEST, max_images)
        request = _parsed(pb.ModelInferRequest, body)
        _check_texts(request.model_name, request.model_version, request.id)
        scheduler = core.find_model(registry, request.model_name, request.model_version)
        asked = _requested(request, max_images)
        self._id, self._outputs = asked.id, asked.outputs
        return (
            scheduler,
            core.images_of(asked, scheduler.engine.manifest, max_images),
            core.top_of(asked.outputs),
        )

    def render(self, results: Sequence[Result], manifest: Manifest) -> _Answer:
        outputs = core.outputs_of(self._outputs, results, manifest.labels)
        return pb.ModelInferResponse(
            model_name=manifest.name,
            model_version=manifest.version,
            id=self._id,
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


class _Type(Protocol[Message]):
    def FromString(self, serialized: bytes, /) -> Message: ...  # noqa: N802 - protobuf's


def _parsed(kind: _Type[Message], message: bytes) -> Message:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise Problem("malformed-request", "the message is not what this method takes") from None


def _check_texts(*texts: str) -> None:
    if any(len(text) > core.MOST_TEXT for text in texts):
        raise Problem("malformed-request", f"an id or a name has more than {core.MOST_TEXT} characters")


def _requested(request: pb.ModelInferRequest, max_images: int) -> core.InferRequest:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Problem("malformed-request", f"{len(request.inputs)} inputs, but {len(raw)} raw contents")
    if max(len(request.inputs), len(request.outputs)) > core.MOST_TENSORS:
        raise Problem("malformed-request", f"more than {core.MOST_TENSORS} inputs or outputs")
    inputs = []
    for number, tensor in enumerate(request.inputs):
        _check_texts(tensor.name, tensor.datatype)
        core.check_parameters(f"input {tensor.name!r}", tensor.parameters)
        data = raw[number] if raw else _contents(tensor, max_images)
        inputs.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, data))
    outputs = [_requested_output(output) for output in request.outputs]
    return core.InferRequest(request.id, inputs, outputs or core.ALL_OUTPUTS)


def _requested_output(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> core.RequestedOutput:
    _check_texts(output.name)
    core.check_parameters(f"output {output.name!r}", output.parameters)
    if "classification" not in output.parameters:
        return core.RequestedOutput(output.name)
    parameter = output.parameters["classification"]
    choice = parameter.WhichOneof("parameter_choice")
    if choice not in ("int64_param", "uint64_param"):
        raise Problem("invalid-parameter", f"classification of output {output.name!r} is no whole number")
    return core.RequestedOutput(output.name, getattr(parameter, choice))


def _contents(tensor: pb.ModelInferRequest.InferInputTensor, max_images: int) -> bytes | list[bytes]:
    core.check_datatype(tensor.name, tensor.datatype)
    if tensor.datatype == "BYTES":
        if len(tensor.contents.bytes_contents) > max_images:
            raise too_many_images(max_images)
        return list(tensor.contents.bytes_contents)
    try:
        return bytes(tensor.contents.uint_contents)
    except ValueError:
        raise Problem("malformed-request", "UINT8 contents must be from 0 to 255") from None


def _with_status(
    method: Callable[[Context], Awaitable[Any]],
) -> Callable[[Any, Context], Awaitable[Any]]:
    """`method`, with its problems answered as gRPC statuses, and their headers as trailing metadata."""

    async def handle(_messages: Any, context: Context) -> Any:
        try:
            return await method(context)
        except Problem as problem:
            refusal = problem
        except Exception:
            log.exception("a gRPC request failed")
            refusal = internal_error()
        code = _CODES.get(refusal.status, grpc.StatusCode.INVALID_ARGUMENT)
        if refusal.name == "body-too-large":
            code = grpc.StatusCode.RESOURCE_EXHAUSTED  # as gRPC itself says it
        trailing = tuple((name.lower(), value) for name, value in refusal.headers.items())
        detail = refusal.detail
        del refusal  # gRPC keeps what `abort` raises, and so this frame, until the next garbage collection
        return await context.abort(code, detail, trailing)

    return handle
