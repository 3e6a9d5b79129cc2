"""One `POST /predict`, from its head to its answer, whatever carries it.

It is driven by calls and answers by one, all on the event loop's thread: a task, futures and further timers
for each request would cost the event loop more than all that is done here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

import orjson
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from models.preprocessing import MEDIA_TYPES
from server.auth import require_key
from server.bodies import BodyMemory, Part, body_too_large, parse_multipart
from server.jobs import Job, Result
from server.lifecycle import Lifecycle
from server.problems import Problem, internal_error
from server.registry import Registry
from server.scheduler import Scheduler, deadline_exceeded
from server.settings import Settings
from server.telemetry import Observed, RequestKey, Telemetry, outcome_of

log = logging.getLogger("trimrt")

DEFAULT_TOP_K: Final = 5
_FORM: Final = "multipart/form-data"

Respond: TypeAlias = "Callable[[int, Mapping[str, str], bytes], None]"


@dataclass(frozen=True, slots=True)
class Service:
    """What all exchanges of an application share."""

    settings: Settings
    lifecycle: Lifecycle
    body_memory: BodyMemory
    telemetry: Telemetry
    registry: Registry


class Exchange:
    """A request under way. Whoever carries it hands over the body, and abandons it if the client leaves.

    Args:
        service: the application's.
        scope: the request's, as in ASGI.
        request_id: to repeat in the answer.
        respond: called once, unless the exchange is abandoned before: status, headers (less
            `Content-Length`) and body of the answer. It may be called from within any method, this one too.
    """

    __slots__ = (
        "_began",
        "_chunks",
        "_deadline",
        "_form",
        "_job",
        "_observed",
        "_over",
        "_parts",
        "_query",
        "_request_id",
        "_respond",
        "_scheduler",
        "_scope",
        "_service",
        "_size",
        "_timer",
        "_top_k",
    )

    def __init__(self, service: Service, scope: Mapping[str, Any], request_id: str, respond: Respond) -> None:
        self._service = service
        self._scope = scope
        self._request_id = request_id
        self._respond = respond
        self._observed = Observed()
        self._over = False
        self._chunks: list[bytes] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._job: Job | None = None
        self._parts: Sequence[Part] = ()
        self._began = service.telemetry.begin()
        self._attempt(self._open)

    def receive(self, chunk: bytes) -> None:
        """A part of the body has come."""
        if not self._over:
            self._attempt(self._keep, chunk)

    def complete(self) -> None:
        """All of the body has come."""
        if not self._over:
            self._attempt(self._submit)

    def abandon(self) -> None:
        """The client is gone; nothing happens if it was answered."""
        if not self._over:
            if self._job is not None:
                self._scheduler.drop(self._job, "cancelled")
            self._end("cancelled", "disconnected")

    # --- steps -------------------------------------------------------------------------------------

    def _attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except Problem as problem:
            self._refuse(problem)
        except Exception:
            log.exception("a request failed")
            self._refuse(internal_error())

    def _open(self) -> None:
        """Turned away before the body is read, an overload costs little."""
        service, settings = self._service, self._service.settings
        headers = dict(self._scope["headers"])
        service.lifecycle.check_serving()
        if settings.protect_predict:
            require_key(HTTPConnection(dict(self._scope)), settings.api_key)
        self._query = _parse_query(self._scope["query_string"])
        timeout = headers.get(b"x-request-timeout-ms")
        seconds = request_timeout(None if timeout is None else timeout.decode("latin-1"), settings)
        self._deadline = self._began + seconds
        service.registry.get(self._query.get("engine")).check_room()
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        self._form = content_type if _media_type(content_type) == _FORM else None
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > settings.max_body_bytes:
            raise body_too_large(settings.max_body_bytes)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _keep(self, chunk: bytes) -> None:
        size = len(chunk)
        if self._size + size > self._service.settings.max_body_bytes:
            raise body_too_large(self._service.settings.max_body_bytes)
        self._service.body_memory.take(size)
        self._size += size
        self._chunks.append(chunk)

    def _submit(self) -> None:
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._parts = _images(self._form, body, self._service.settings)
        # Engines may have been switched since the request came.
        self._scheduler: Scheduler = self._service.registry.get(self._query.get("engine"))
        self._observed.manifest = manifest = self._scheduler.engine.manifest
        self._top_k = _top_k(self._query.get("top_k"), len(manifest.labels))
        images = [part.data for part in self._parts]
        self._job = self._scheduler.submit(images, self._deadline, self._done, top=self._top_k)

    def _done(self, outcome: list[Result] | Problem) -> None:
        if isinstance(outcome, Problem):
            self._refuse(outcome)
        else:
            self._attempt(self._answer, outcome)

    def _expire(self) -> None:
        if self._job is None:
            seconds = self._deadline - self._began
            self._refuse(Problem("body-timeout", f"the body had not arrived after {seconds:g} s"))
        else:
            self._scheduler.drop(self._job, "expired")
            self._refuse(deadline_exceeded())

    # --- its end -----------------------------------------------------------------------------------

    def _answer(self, results: Sequence[Result]) -> None:
        self._observed.results = results
        manifest = self._scheduler.engine.manifest
        latencies = [latency_ms(result) for result in results]
        body = {
            "request_id": self._request_id,
            "engine": {
                "name": manifest.name,
                "version": manifest.version,
                "backend": manifest.backend,
                "precision": manifest.precision,
            },
            "results": [
                {
                    "filename": part.filename,
                    "predictions": _predictions(result, manifest.labels, self._top_k),
                    "batch_size": result.batch_size,
                    "latency_ms": latency,
                }
                for part, result, latency in zip(self._parts, results, latencies, strict=True)
            ],
        }
        headers = {"Server-Timing": server_timing(latencies), "Content-Type": "application/json"}
        self._close(200, headers, orjson.dumps(body), "ok", "")

    def _refuse(self, problem: Problem) -> None:
        response = problem.response()
        headers = dict(response.headers)
        del headers["content-length"]
        self._close(problem.status, headers, bytes(response.body), outcome_of(problem), problem.name)

    def _close(self, status: int, headers: Mapping[str, str], body: bytes, outcome: str, reason: str) -> None:
        if not self._over:
            try:
                self._respond(status, headers, body)
            finally:
                self._end(outcome, reason)

    def _end(self, outcome: str, reason: str) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        service = self._service
        service.body_memory.back(self._size)
        key = RequestKey("predict", outcome, reason)
        service.telemetry.end(key, Headers(raw=self._scope["headers"]), self._began, self._observed)
        # The job knows the exchange: a cycle would keep the body until the next garbage collection.
        self._job = self._timer = None
        self._chunks, self._parts = [], ()


@lru_cache(maxsize=64)
def _parse_query(query: bytes) -> Mapping[str, str]:
    return dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))


def _top_k(value: str | None, classes: int) -> int:
    if value is None:
        return min(DEFAULT_TOP_K, classes)
    if not (value.isascii() and value.isdecimal() and 1 <= int(value[:9]) <= classes):
        raise Problem(
            "invalid-parameter", f"top_k must be a whole number from 1 to {classes}, not {value[:40]!r}"
        )
    return int(value)


def request_timeout(header: str | None, settings: Settings) -> float:
    """How long a request may take, seconds: what it asks for in milliseconds, up to the server's maximum.

    Raises:
        Problem: `invalid-parameter`.
    """
    if header is None:
        return settings.timeout_ms / 1000
    try:
        asked = float(header)
    except ValueError:
        asked = float("nan")
    if not asked > 0:
        raise Problem("invalid-parameter", f"X-Request-Timeout-Ms must be a positive number, not {header!r}")
    return min(asked, settings.timeout_ms) / 1000


def _media_type(content_type: str) -> str:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES and media_type != _FORM:
        raise Problem(
            "unsupported-media-type",
            f"Content-Type is {media_type or 'missing'!r}; "
            f"send {_FORM} with a field `file`, or one of " + ", ".join(sorted(MEDIA_TYPES)),
        )
    return media_type


def _images(form: str | None, body: bytes, settings: Settings) -> Sequence[Part]:
    """The files of a form, of which `form` is the content type, or the body as the only one."""
    if form is None:
        return [Part("file", None, body)]
    images = [part for part in parse_multipart(form, body) if part.name == "file"]
    if not images:
        raise Problem("invalid-parameter", "the form has no field `file`")
    if len(images) > settings.max_images:
        raise Problem("too-many-images", f"{len(images)} images; the limit is {settings.max_images}")
    return images


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
