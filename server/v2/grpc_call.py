"""One inference over gRPC, and how messages are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.admission import Call
from server.auth import Caller
from server.bodies import too_many_images
from server.jobs import Result
from server.problems import Problem
from server.registry import Registry
from server.scheduler import Scheduler
from server.v2 import core
from server.v2 import inference_pb2 as pb
from server.v2.regions import Placement, Regions
from server.v2.tensors import InputTensor, OutputTensor
from server.v2.wire import check_size

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Answer: TypeAlias = "pb.ModelInferResponse | Problem"
Message = TypeVar("Message", covariant=True)

LARGE_REQUEST: Final = 256 << 10  # bytes; as many take a few milliseconds to parse
# Of `ModelInferRequest`, see `wire`: inputs with their contents' bytes_contents, outputs, raw_input_contents.
REQUEST: Final[dict[int, Any]] = {5: {5: {8: None}}, 6: {}, 7: None}


class InferCall(Call[Answer]):
    """One inference request.

    Args:
        context: gRPC's, of the call.
        regions: of shared memory.
    """

    protocol = "v2-grpc"

    def __init__(self, context: Context, regions: Regions) -> None:
        self._context = context
        self._caller = caller_of(context)  # now: once the call is over, gRPC reads memory that is freed
        self._regions = regions

    def caller(self) -> Caller:
        """See `Call`."""
        return self._caller

    def timeout(self) -> float | None:
        """See `Call`."""
        return cast("float | None", self._context.time_remaining())

    def priority(self) -> str | None:
        """See `Call`."""
        return self._caller.headers.get("x-priority")

    def is_slow_to_read(self, body: bytes) -> bool:
        """See `Call`."""
        return len(body) > LARGE_REQUEST

    def read(
        self, body: bytes, registry: Registry, max_images: int
    ) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        """See `Call`."""
        check_size(memoryview(body), REQUEST, max_images)
        request = parsed(pb.ModelInferRequest, body)
        check_texts(request.model_name, request.model_version, request.id)
        scheduler = core.find_model(registry, request.model_name, request.model_version)
        asked = _requested(request, max_images, self._fetch)
        if any(output.place for output in asked.outputs):
            self._regions.check(self.caller())
        self._id, self._outputs = asked.id, asked.outputs
        return (
            scheduler,
            core.images_of(asked, scheduler.engine.manifest, max_images),
            core.top_of(asked.outputs),
        )

    def _fetch(self, place: Placement) -> bytes:
        self._regions.check(self.caller())
        data = self._regions.read(place, self.fetched)
        self.fetched += len(data)
        return data

    def render(self, results: Sequence[Result], manifest: Manifest) -> Answer:
        """See `Call`."""
        outputs = core.outputs_of(self._outputs, results, manifest.labels)
        cached = core.cached_images(results)
        return pb.ModelInferResponse(
            model_name=manifest.name,
            model_version=manifest.version,
            id=self._id,
            parameters={"cached_images": pb.InferParameter(int64_param=cached)} if cached else {},
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(
                    name=output.name,
                    datatype=output.datatype,
                    shape=output.shape,
                    parameters=_parameters_of(asked.place),
                )
                for asked, output in zip(self._outputs, outputs, strict=True)
            ],
            raw_output_contents=[
                self._delivered(output, asked.place)
                for asked, output in zip(self._outputs, outputs, strict=True)
            ],
        )

    def _delivered(self, output: OutputTensor, place: Placement | None) -> bytes:
        """What the answer holds of an output: nothing, if that goes into shared memory."""
        if place is None:
            return output.raw()
        self._regions.write(place, output.raw())
        return b""

    def refusal(self, problem: Problem) -> Answer:
        """See `Call`."""
        return problem


def caller_of(context: Context) -> Caller:
    """Who calls."""
    metadata = {
        name: value if isinstance(value, str) else value.decode("latin-1")
        for name, value in context.invocation_metadata() or ()
    }
    return Caller(address_of(context.peer()), metadata, scheme=None)


def address_of(peer: str) -> str:
    """The IP address in gRPC's peer, like `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


class Type(Protocol[Message]):
    """A class of messages."""

    def FromString(self, serialized: bytes, /) -> Message:  # noqa: N802 - protobuf's
        """A message by its encoded form."""
        ...


def parsed(kind: Type[Message], message: bytes) -> Message:
    """The message of that kind.

    Raises:
        Problem: `malformed-request`.
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        raise Problem("malformed-request", "the message is not what this method takes") from None


def check_texts(*texts: str) -> None:
    """Raise the problem `malformed-request` if an id or a name is too long."""
    if any(len(text) > core.MOST_TEXT for text in texts):
        raise Problem("malformed-request", f"an id or a name has more than {core.MOST_TEXT} characters")


def _requested(
    request: pb.ModelInferRequest, max_images: int, fetch: Callable[[Placement], bytes]
) -> core.InferRequest:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Problem("malformed-request", f"{len(request.inputs)} inputs, but {len(raw)} raw contents")
    if max(len(request.inputs), len(request.outputs)) > core.MOST_TENSORS:
        raise Problem("malformed-request", f"more than {core.MOST_TENSORS} inputs or outputs")
    inputs = []
    for number, tensor in enumerate(request.inputs):
        check_texts(tensor.name, tensor.datatype)
        data: bytes | list[bytes]
        if (place := _place_of(f"input {tensor.name!r}", tensor.parameters)) is not None:
            if (raw and raw[number]) or tensor.HasField("contents"):
                raise Problem("malformed-request", f"input {tensor.name!r} is here and in shared memory")
            data = fetch(place)
        else:
            data = raw[number] if raw else _contents(tensor, max_images)
        inputs.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, data))
    outputs = [_requested_output(output) for output in request.outputs]
    return core.InferRequest(request.id, inputs, outputs or core.ALL_OUTPUTS)


def _requested_output(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> core.RequestedOutput:
    check_texts(output.name)
    place = _place_of(f"output {output.name!r}", output.parameters)
    if "classification" not in output.parameters:
        return core.RequestedOutput(output.name, place=place)
    parameter = output.parameters["classification"]
    choice = parameter.WhichOneof("parameter_choice")
    if choice not in ("int64_param", "uint64_param"):
        raise Problem("invalid-parameter", f"classification of output {output.name!r} is no whole number")
    return core.RequestedOutput(output.name, getattr(parameter, choice), place=place)


def _place_of(tensor: str, parameters: Mapping[str, pb.InferParameter]) -> Placement | None:
    if not parameters:
        return None
    values = {name: value_of(parameter) for name, parameter in parameters.items()}
    return core.place_of(tensor, values)


def value_of(parameter: pb.InferParameter | pb.LogSettingsRequest.SettingValue) -> object:
    """The value that was chosen of a parameter's kinds; None: none was."""
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def _parameters_of(place: Placement | None) -> dict[str, pb.InferParameter]:
    if place is None:
        return {}
    return {
        name: pb.InferParameter(**{"string_param" if isinstance(value, str) else "int64_param": value})
        for name, value in core.parameters_of(place).items()
    }


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
