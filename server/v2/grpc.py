"""The protocol over gRPC. Only imported when `--grpc-port` is set; needs the extra `grpc`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

# What gRPC has to say comes as exceptions too; its lines on standard error are not the log's.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from server.admission import Admission
from server.problems import Problem, internal_error
from server.service import Service
from server.v2 import core
from server.v2 import inference_pb2 as pb
from server.v2.grpc_call import Answer, Context, InferCall, check_texts
from server.v2.grpc_extensions import Extensions, read_message
from server.v2.intake import Intake
from server.version import VERSION

log = logging.getLogger("trimrt.grpc")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of gRPC's log says more than that a client left before it was answered."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)

_MOST_CALLS: Final = 1_024  # at once; beyond it, RESOURCE_EXHAUSTED

_CODES: Final = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
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
        handlers = {
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                _with_status(_refuse_stream),
                response_serializer=pb.ModelStreamInferResponse.SerializeToString,
            )
        }
        for method in (
            *(self.server_live, self.server_ready, self.model_ready),
            *(self.server_metadata, self.model_metadata, self.model_infer),
            *Extensions(self._service, self._intake).methods(),
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
        request = await read_message(self._intake, context, pb.ModelReadyRequest)
        try:
            core.find_model(self._service.registry, request.name, request.version)
        except Problem:  # to be asked that is what the method is for
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def server_metadata(self, _context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="trimrt", version=VERSION, extensions=core.extensions(self._service.regions)
        )

    async def model_metadata(self, context: Context) -> pb.ModelMetadataResponse:
        request = await read_message(self._intake, context, pb.ModelMetadataRequest)
        check_texts(request.name, request.version)
        scheduler = core.find_model(self._service.registry, request.name, request.version)
        return pb.ModelMetadataResponse(**core.model_metadata(scheduler.engine.manifest))

    async def model_infer(self, context: Context) -> pb.ModelInferResponse:
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def respond(answer: Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        admission = Admission(self._service, InferCall(context, self._service.regions), respond)
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
        self, context: Context, admission: Admission[Answer], answered: asyncio.Future[Answer]
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


async def _refuse_stream(_context: Context) -> None:
    raise Problem("not-supported", "a model answers each request once: call ModelInfer for each, no stream")


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
