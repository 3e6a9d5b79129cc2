"""`POST /predict`: what its request means, and what its answer looks like; and how ASGI carries an inference.

`HttpCall` is what it shares with the Open Inference Protocol over HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.admission import Admission, Call
from server.auth import Caller
from server.bodies import Part, parse_multipart
from server.jobs import Result
from server.problems import MEDIA_TYPE, Problem
from server.registry import Registry
from server.scheduler import Scheduler
from server.service import service_of

DEFAULT_TOP_K: Final = 5
_FORM: Final = "multipart/form-data"
_BYTES: Final = (
    "",
    "application/octet-stream",
    "binary/octet-stream",
    "application/x-www-form-urlencoded",  # what curl calls any --data-binary
)
_LONGEST_NUMBER: Final = 19  # digits
_LONGEST_QUERY: Final = 4096
_MOST_PARAMETERS: Final = 32
_NAMED_FIELDS: Final = 10
_LARGE_FORM: Final = 1 << 20  # bytes; to search that many takes a millisecond

HttpAnswer: TypeAlias = "tuple[int, Mapping[str, str], bytes]"
"""Status, headers less `Content-Length`, and body."""


class HttpCall(Call[HttpAnswer]):
    """What all inference over HTTP has in common.

    Args:
        scope: the request's, as in ASGI: `headers`, `query_string`, `client` and `scheme`.
    """

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self._scope = scope
        self._headers: dict[bytes, bytes] = dict(scope["headers"])

    def caller(self) -> Caller:
        """See `Call`."""
        return Caller.over_http(self._scope)

    def timeout(self) -> float | None:
        """See `Call`."""
        header = self._headers.get(b"x-request-timeout-ms")
        if header is None:
            return None
        try:
            milliseconds = float(header)
        except ValueError:
            milliseconds = float("nan")
        if not milliseconds > 0:
            sent = header.decode("latin-1")
            raise Problem(
                "invalid-parameter", f"X-Request-Timeout-Ms must be a positive number, not {sent!r}"
            )
        return milliseconds / 1000

    def priority(self) -> str | None:
        """See `Call`."""
        header = self._headers.get(b"x-priority")
        return None if header is None else header.decode("latin-1")

    def announced_bytes(self) -> int:
        """See `Call`."""
        encoding = self._headers.get(b"content-encoding", b"")
        if encoding.strip().lower() not in (b"", b"identity"):
            raise Problem(
                "unsupported-media-type",
                "a body with a Content-Encoding is not accepted; send it as it is (images are compressed)",
                headers={"Accept-Encoding": "identity"},  # RFC 9110, 15.5.16
            )
        length = self._headers.get(b"content-length", b"")
        if len(length) > _LONGEST_NUMBER:
            raise Problem("malformed-request", f"the Content-Length has {len(length)} digits")
        return int(length) if length.isdigit() else 0

    def refusal(self, problem: Problem) -> HttpAnswer:
        """See `Call`."""
        return problem.status, {**problem.headers, "Content-Type": MEDIA_TYPE}, problem.body()


class PredictCall(HttpCall):
    """One `POST /predict`.

    Args:
        scope: see `HttpCall`.
        request_id: to repeat in the answer.
    """

    protocol = "predict"

    def __init__(self, scope: Mapping[str, Any], request_id: str) -> None:
        super().__init__(scope)
        self._request_id = request_id

    def find_engine(self, registry: Registry) -> Scheduler:
        """See `Call`."""
        query: bytes = self._scope["query_string"]
        if len(query) > _LONGEST_QUERY:
            raise Problem("invalid-parameter", f"the query has more than {_LONGEST_QUERY:,} characters")
        self._query = _parse_query(query)
        return registry.get(self._query.get("engine"))

    def announced_bytes(self) -> int:
        """See `Call`."""
        content_type = self._headers.get(b"content-type", b"").decode("latin-1")
        self._form = content_type if _media_type(content_type) == _FORM else None
        return super().announced_bytes()

    def is_slow_to_read(self, body: bytes) -> bool:
        """See `Call`."""
        return self._form is not None and len(body) > _LARGE_FORM

    def read(
        self, body: bytes, registry: Registry, max_images: int
    ) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        """See `Call`."""
        self._parts = (
            [Part("file", None, body)] if self._form is None else _files(self._form, body, max_images)
        )
        for number, part in enumerate(self._parts):
            if not part.data or part.data.startswith(b"data:"):
                raise _no_file(number, part)
        scheduler = self.find_engine(registry)
        self._top_k = _top_k(self._query.get("top_k"), len(scheduler.engine.manifest.labels))
        return scheduler, [part.data for part in self._parts], self._top_k

    def render(self, results: Sequence[Result], manifest: Manifest) -> HttpAnswer:
        """See `Call`."""
        latencies = [latency_ms(result) for result in results]
        body = {
            "request_id": self._request_id,
            "engine": {
                "name": manifest.name,
                "version": manifest.version,
                "backend": manifest.backend,
                "precision": manifest.precision,
                "activation": manifest.activation,
            },
            "results": [
                {
                    "filename": part.filename,
                    "predictions": _predictions(result, manifest.labels, self._top_k),
                    "cached": result.cached,
                    "batch_size": result.batch_size,
                    "latency_ms": latency,
                }
                for part, result, latency in zip(self._parts, results, latencies, strict=True)
            ],
        }
        headers = {"Server-Timing": server_timing(latencies), "Content-Type": "application/json"}
        return 200, headers, orjson.dumps(body)


async def answer_over_asgi(request: Request, call: HttpCall) -> Response:
    """Carry `call`, which is `request` understood, through the admission.

    Raises:
        ClientDisconnect: the client went away.
    """
    answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

    def respond(answer: HttpAnswer) -> None:
        if not answered.done():
            status, headers, body = answer
            answered.set_result(Response(body, status, headers))

    admission = Admission(service_of(request.app), call, respond)
    admission.open()
    carrier = asyncio.create_task(_carry(request.receive, admission, answered))
    try:
        return await answered
    finally:
        carrier.cancel()
        admission.abandon()


async def _carry(
    receive: Receive, admission: Admission[HttpAnswer], answered: asyncio.Future[Response]
) -> None:
    """Hand the body over as it comes, then watch for a client that leaves."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            if not answered.done():
                answered.set_exception(ClientDisconnect())
            return
        admission.receive(message.get("body", b""))
        if not message.get("more_body", False):
            admission.complete()


@lru_cache(maxsize=64)
def _parse_query(query: bytes) -> Mapping[str, str]:
    try:
        return dict(
            parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MOST_PARAMETERS)
        )
    except ValueError:
        raise Problem("invalid-parameter", f"the query has more than {_MOST_PARAMETERS} parameters") from None


def _top_k(value: str | None, classes: int) -> int:
    if value is None:
        return min(DEFAULT_TOP_K, classes)
    if not (value.isascii() and value.isdecimal() and len(value) <= 9 and 1 <= int(value) <= classes):
        raise Problem(
            "invalid-parameter", f"top_k must be a whole number from 1 to {classes}, not {value[:40]!r}"
        )
    return int(value)


def _media_type(content_type: str) -> str:
    media_type = content_type.partition(";")[0].strip().lower()
    # The bytes decide what an image is: clients call one format by many names, or by none.
    if not (media_type in _BYTES or media_type == _FORM or media_type.startswith("image/")):
        raise Problem(
            "unsupported-media-type",
            f"Content-Type is {media_type[:100]!r}; send {_FORM} with a field `file`, or an image as image/*",
        )
    return media_type


def _files(content_type: str, body: bytes, max_images: int) -> list[Part]:
    parts = parse_multipart(content_type, body, max_images)
    files = [part for part in parts if part.name == "file"]
    if not files:
        names = [f"`{name[:50]}`" for name in dict.fromkeys(part.name for part in parts)]
        more = ["others"] if len(names) > _NAMED_FIELDS else []
        came = ", ".join(names[:_NAMED_FIELDS] + more) or "no fields"
        raise Problem("invalid-parameter", f"the form has no field `file`; it has {came}")
    return files


def _no_file(number: int, part: Part) -> Problem:
    """What is answered where a file's bytes should be, and are not."""
    name = "" if part.filename is None else f" ({part.filename[:100]})"
    reason = "is a data: URL; send the bytes that its base64 stands for" if part.data else "is empty"
    return Problem("image-damaged", f"image {number}{name} {reason}", extra={"image": number})


def _predictions(result: Result, labels: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    probability = result.probabilities.item  # picking a few together would take longer
    return [
        {"label": labels[index], "index": index, "probability": probability(index)}
        for index in result.order[:top_k].tolist()
    ]


def latency_ms(result: Result) -> dict[str, float]:
    """An image's time in each stage, and in all, in milliseconds."""
    stages = {
        "decode": _milliseconds(result.decode),
        "queue": _milliseconds(result.queue),
        "inference": _milliseconds(result.inference),
        "total": _milliseconds(result.total),
    }
    for stage, seconds in result.device.items():
        stages[stage] = _milliseconds(seconds)
    return stages


def _milliseconds(seconds: float) -> float:
    return int(seconds * 1e6 + 0.5) / 1000  # takes half as long as `round`


def server_timing(latencies: Sequence[Mapping[str, float]]) -> str:
    """The `Server-Timing` header: the slowest image's stages, milliseconds."""
    slowest = max(latencies, key=itemgetter("total"))
    return _timing_format(tuple(slowest)) % tuple(slowest.values())


@lru_cache(maxsize=64)
def _timing_format(stages: tuple[str, ...]) -> str:
    return ", ".join([f"{stage};dur=%.3f" for stage in stages])
