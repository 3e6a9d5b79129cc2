"""The protocol over gRPC. Only imported when `--grpc-port` is set; needs the extra `grpc`."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

import grpc
import numpy as np
from fastapi import FastAPI

from server.auth import is_key
from server.problems import Problem
from server.settings import Settings
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
_MESSAGE_OVERHEAD: Final = 1 << 16  # of a request around its images


async def start(app: FastAPI, settings: Settings) -> grpc.aio.Server:
    """Serve `app`'s engines on `settings.grpc_port`, in the running event loop.

    Raises:
        RuntimeError: the port is taken.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_body_bytes + _MESSAGE_OVERHEAD),
            ("grpc.so_reuseport", 0),
        ]
    )
    server.add_generic_rpc_handlers((_Service(app, settings).handler(),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    await server.start()
    log.info("listening", extra={"grpc": f"{host}:{port}"})
    return server


class _Service:
    """`inference.GRPCInferenceService`."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._state = app.state
        self._settings = settings

    def handler(self) -> grpc.GenericRpcHandler:
        """Every method, without generated service code."""
        methods = (
            self.server_live,
            self.server_ready,
            self.model_ready,
            self.server_metadata,
            self.model_metadata,
            self.model_infer,
        )
        handlers = {}
        for method in methods:
            name = "".join(word.capitalize() for word in method.__name__.split("_"))
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                _with_status(method),
                request_deserializer=getattr(pb, f"{name}Request").FromString,
                response_serializer=getattr(pb, f"{name}Response").SerializeToString,
            )
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)

    async def server_live(self, _request: pb.ServerLiveRequest, _context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(
        self, _request: pb.ServerReadyRequest, _context: Context
    ) -> pb.ServerReadyResponse:
        lifecycle = self._state.lifecycle
        return pb.ServerReadyResponse(ready=lifecycle.loaded and not lifecycle.draining)

    async def model_ready(self, request: pb.ModelReadyRequest, _context: Context) -> pb.ModelReadyResponse:
        core.find_model(self._state.registry, request.name, request.version)
        return pb.ModelReadyResponse(ready=True)

    async def server_metadata(
        self, _request: pb.ServerMetadataRequest, _context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="trimrt", version=VERSION, extensions=core.EXTENSIONS)

    async def model_metadata(
        self, request: pb.ModelMetadataRequest, _context: Context
    ) -> pb.ModelMetadataResponse:
        scheduler = core.find_model(self._state.registry, request.name, request.version)
        return pb.ModelMetadataResponse(**core.model_metadata(scheduler.engine.manifest))

    async def model_infer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        metadata = {name: str(value) for name, value in context.invocation_metadata() or ()}
        with self._state.telemetry.request("v2-grpc", metadata) as observed:
            self._state.lifecycle.check_serving()
            if self._settings.protect_predict:
                self._require_key(metadata, context.peer())
            scheduler = core.find_model(self._state.registry, request.model_name, request.model_version)
            manifest = scheduler.engine.manifest
            asked = _requested(request)
            core.check_outputs(asked, len(manifest.labels))
            images = core.images_of(asked, manifest, self._settings.max_images)
            longest = self._settings.timeout_ms / 1000
            timeout = min(context.time_remaining() or longest, longest)
            # A client that goes away cancels this coroutine, and with it the images.
            observed.manifest = manifest
            observed.results = results = await scheduler.infer(images, timeout, top=asked.top)
            outputs = core.outputs_of(asked, results, manifest.labels)
            return pb.ModelInferResponse(
                model_name=manifest.name,
                model_version=manifest.version,
                id=request.id,
                outputs=[
                    pb.ModelInferResponse.InferOutputTensor(
                        name=output.name, datatype=output.datatype, shape=output.shape
                    )
                    for output in outputs
                ],
                raw_output_contents=[output.raw() for output in outputs],
            )

    def _require_key(self, metadata: Mapping[str, str], peer: str) -> None:
        key = self._settings.api_key
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        token = token if scheme.lower() == "bearer" else metadata.get("x-api-key", "")
        if not _is_loopback(peer) and (key is None or not is_key(token, key)):
            raise Problem("unauthorized", "send the API key as metadata `authorization: Bearer <key>`")


def _is_loopback(peer: str) -> bool:
    """Whether gRPC's peer, like `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`, is this machine."""
    address = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _requested(request: pb.ModelInferRequest) -> core.InferRequest:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Problem("malformed-request", f"{len(request.inputs)} inputs, but {len(raw)} raw contents")
    inputs = [
        InputTensor(tensor.name, tensor.datatype, tensor.shape, raw[number] if raw else _contents(tensor))
        for number, tensor in enumerate(request.inputs)
    ]
    if not request.outputs:
        return core.InferRequest(request.model_name, request.model_version, inputs)
    outputs = [
        core.RequestedOutput(output.name, output.parameters["classification"].int64_param)
        for output in request.outputs
    ]
    return core.InferRequest(request.model_name, request.model_version, inputs, outputs)


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
