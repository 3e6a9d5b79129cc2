"""Clients for each way that an inference request takes into the server, all used alike."""

from __future__ import annotations

import json
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPResponse
from typing import Any, ClassVar
from urllib.parse import urlsplit

import grpc
import numpy as np
from running import Running

from server.telemetry import RequestKey
from server.v2 import inference_pb2 as pb
from server.v2.tensors import pack_bytes

_GRPC_CODES = {
    "body-too-large": "RESOURCE_EXHAUSTED",
    "deadline-exceeded": "DEADLINE_EXCEEDED",
    "engine-not-found": "NOT_FOUND",
    "forbidden": "PERMISSION_DENIED",
    "image-damaged": "INVALID_ARGUMENT",
    "inference-failed": "INTERNAL",
    "invalid-parameter": "INVALID_ARGUMENT",
    "internal-error": "INTERNAL",
    "malformed-request": "INVALID_ARGUMENT",
    "not-ready": "UNAVAILABLE",
    "queue-full": "RESOURCE_EXHAUSTED",
    "rate-limited": "RESOURCE_EXHAUSTED",
    "too-many-images": "INVALID_ARGUMENT",
    "unauthorized": "UNAUTHENTICATED",
}


@dataclass(frozen=True)
class Answer:
    """What the client got: `error` is empty, or a problem's name as `Carrier.error` has it."""

    error: str
    detail: str = ""
    best: Sequence[int] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


class Sent(ABC):
    """A request on its way."""

    @abstractmethod
    def answer(self) -> Answer:
        """Waits for it."""

    @abstractmethod
    def leave(self) -> None:
        """The client goes away."""


class Carrier(ABC):
    protocol: ClassVar[str]
    asgi: ClassVar[bool] = False  # goes through the layers of ASGI

    def __init__(self, server: Running) -> None:
        self.server = server
        self.connections = ExitStack()

    @staticmethod
    @abstractmethod
    def body(images: Sequence[bytes]) -> bytes:
        """What a request for those images sends."""

    @abstractmethod
    def send_body(
        self, body: bytes, engine: str = "tiny", timeout_ms: float | None = None, **headers: str
    ) -> Sent: ...

    def send(self, *images: bytes, **options: Any) -> Sent:
        return self.send_body(self.body(images), **options)

    def ask(self, *images: bytes, **options: Any) -> Answer:
        return self.send(*images, **options).answer()

    def error(self, problem: str) -> str:
        """How the client sees the problem of that name."""
        return problem

    @abstractmethod
    def is_well(self, way: str) -> bool:
        """Whether the server says that it is `live` or `ready`."""

    def counted(self, outcome: str, reason: str) -> int:
        """How many requests of this protocol ended so."""
        return self.server.service.telemetry.requests[RequestKey(self.protocol, outcome, reason)]


class _SentOverHttp(Sent):
    def __init__(self, carrier: Http, connection: socket.socket) -> None:
        self._carrier = carrier
        self._connection = connection

    def answer(self) -> Answer:
        with self._connection:
            response = HTTPResponse(self._connection)
            response.begin()
            content = json.loads(response.read())
        headers = {name.lower(): value for name, value in response.headers.items()}
        if response.status == 200:
            return Answer("", best=self._carrier.best(content), headers=headers)
        assert headers["content-type"] == "application/problem+json"
        return Answer(content["type"].removeprefix("urn:trimrt:problem:"), content["detail"], (), headers)

    def leave(self) -> None:
        self._connection.close()


class Http(Carrier):
    """Over a connection of its own for each request."""

    content_type: ClassVar[str]
    prefix: ClassVar[str] = ""  # of the routes

    def is_well(self, way: str) -> bool:
        return self.server.client.get(f"{self.prefix}/health/{way}").status_code == 200

    def head(self, body: bytes) -> dict[str, str]:
        """The headers that go with a body."""
        return {"Content-Length": str(len(body))}

    @abstractmethod
    def path(self, engine: str) -> str: ...

    @abstractmethod
    def best(self, content: Any) -> list[int]: ...

    def open(
        self,
        body_headers: Mapping[str, str],
        engine: str = "tiny",
        timeout_ms: float | None = None,
        **more: str,
    ) -> tuple[_SentOverHttp, socket.socket]:
        """A request whose body is still to be sent."""
        address = urlsplit(self.server.url)
        connection = socket.create_connection((address.hostname, address.port), timeout=20)
        self.connections.enter_context(connection)
        headers = {"Host": address.netloc, "Content-Type": self.content_type, **body_headers}
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        if timeout_ms is not None:
            headers["X-Request-Timeout-Ms"] = str(timeout_ms)
        lines = [
            f"POST {self.path(engine)} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return _SentOverHttp(self, connection), connection

    def send_body(
        self, body: bytes, engine: str = "tiny", timeout_ms: float | None = None, **headers: str
    ) -> Sent:
        sent, connection = self.open(self.head(body), engine, timeout_ms, **headers)
        connection.sendall(body)
        return sent


class Predict(Http):
    protocol = "predict"
    content_type = "multipart/form-data; boundary=b"

    def path(self, engine: str) -> str:
        return f"/predict?engine={engine}"

    @staticmethod
    def body(images: Sequence[bytes]) -> bytes:
        part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n%b\r\n'
        return b"".join([part % image for image in images]) + b"--b--\r\n"

    def best(self, content: Any) -> list[int]:
        return [result["predictions"][0]["index"] for result in content["results"]]


class PredictThroughAsgi(Predict):
    asgi = True


class Rest(Http):
    protocol = "v2-rest"
    content_type = "application/octet-stream"
    prefix = "/v2"

    def path(self, engine: str) -> str:
        return f"/v2/models/{engine}/infer"

    @staticmethod
    def body(images: Sequence[bytes]) -> bytes:
        data = pack_bytes(images)
        tensor = {"name": "pixels", "datatype": "BYTES", "shape": [len(images)]}
        return (
            json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}]}).encode() + data
        )

    def head(self, body: bytes) -> dict[str, str]:
        return super().head(body) | {"Inference-Header-Content-Length": str(body.find(b"]}") + 2)}

    def best(self, content: Any) -> list[int]:
        outputs = {output["name"]: output for output in content["outputs"]}
        logits = np.reshape(outputs["logits"]["data"], outputs["logits"]["shape"])
        return logits.argmax(1).tolist()


class RestThroughAsgi(Rest):
    asgi = True


class _SentOverGrpc(Sent):
    def __init__(self, call: Any) -> None:
        self._call = call

    def answer(self) -> Answer:
        try:
            response = pb.ModelInferResponse.FromString(self._call.result(timeout=20))
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details(), (), dict(error.trailing_metadata()))
        raw = dict(zip((it.name for it in response.outputs), response.raw_output_contents, strict=True))
        logits = np.frombuffer(raw["logits"], np.float32).reshape(response.outputs[0].shape)
        return Answer("", best=logits.argmax(1).tolist())

    def leave(self) -> None:
        self._call.cancel()


class Grpc(Carrier):
    protocol = "v2-grpc"

    def __init__(self, server: Running, channel: grpc.Channel) -> None:
        super().__init__(server)
        self._channel = channel
        self._infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def is_well(self, way: str) -> bool:
        method = self._channel.unary_unary(f"/inference.GRPCInferenceService/Server{way.title()}")
        return method(b"", timeout=20) == pb.ServerLiveResponse(live=True).SerializeToString()

    @staticmethod
    def body(images: Sequence[bytes]) -> bytes:
        tensor = pb.ModelInferRequest.InferInputTensor(name="pixels", datatype="BYTES", shape=[len(images)])
        raw = [pack_bytes(images)]
        return pb.ModelInferRequest(inputs=[tensor], raw_input_contents=raw).SerializeToString()

    def send_body(
        self, body: bytes, engine: str = "tiny", timeout_ms: float | None = None, **headers: str
    ) -> Sent:
        # Messages may be sent in parts that are merged.
        body = pb.ModelInferRequest(model_name=engine).SerializeToString() + body
        metadata = [(name.replace("_", "-").lower(), value) for name, value in headers.items()]
        timeout = None if timeout_ms is None else timeout_ms / 1000
        return _SentOverGrpc(self._infer.future(body, timeout=timeout, metadata=metadata))

    def send_no_message(self) -> Sent:
        infer = self._channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        return _SentOverGrpc(infer.future(iter(()), timeout=20))

    def error(self, problem: str) -> str:
        return _GRPC_CODES[problem]


HTTP = {
    "predict": Predict,
    "predict-asgi": PredictThroughAsgi,
    "v2-rest": Rest,
    "v2-rest-asgi": RestThroughAsgi,
}
CARRIERS = {**HTTP, "v2-grpc": Grpc}


@contextmanager
def carrier(kind: type[Carrier], server: Running, grpc_port: int) -> Iterator[Carrier]:
    """A carrier of that kind to `server`."""
    if issubclass(kind, Grpc):
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            yield kind(server, channel)
        return
    log = logging.getLogger("trimrt.access")
    level = log.level
    log.setLevel(logging.INFO if kind.asgi else logging.WARNING)  # where it is on, requests take ASGI's way
    it = kind(server)
    try:
        with it.connections:
            yield it
    finally:
        log.setLevel(level)
