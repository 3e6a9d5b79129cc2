"""The policy that every inference request meets, whatever protocol carries it.

In this order: the drain, the key, the deadline, the engine and the room in its queue, the size of the body
and the memory that all bodies share, the number of images. Then the outcome is counted, once.

A carrier (the HTTP parser, ASGI, gRPC) hands the request over by plain calls on the event loop's thread, and
a `Call` parses it and renders the answer. A task, futures and further timers for each request would cost the
event loop more than all that is done here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, final

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.auth import Caller, require_key
from server.bodies import body_too_large
from server.jobs import Job, Result
from server.problems import Problem, internal_error
from server.registry import Registry
from server.scheduler import Scheduler, deadline_exceeded
from server.service import Service
from server.telemetry import Ended, RequestKey, outcome_of

log = logging.getLogger("trimrt")

Answer = TypeVar("Answer")


class Call(ABC, Generic[Answer]):
    """One request as its protocol has it. A `Problem` that a method raises ends the request."""

    protocol: str  # see `RequestKey`

    @abstractmethod
    def caller(self) -> Caller:
        """Who calls."""

    @abstractmethod
    def timeout(self) -> float | None:
        """Seconds that the client wants to wait at most; None if it does not say."""

    def find_engine(self, registry: Registry) -> Scheduler | None:
        """The engine that the head names; None where only the body does."""
        return None

    def announced_bytes(self) -> int:
        """Size of the body by the head, which is also checked for the body's type; 0 if it does not say."""
        return 0

    @abstractmethod
    def read(self, body: bytes, registry: Registry) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        """The engine (which may have been switched since), the images, how many classes of each to rank."""

    @abstractmethod
    def render(self, results: Sequence[Result], manifest: Manifest) -> Answer:
        """The answer; one result per image."""

    @abstractmethod
    def refusal(self, problem: Problem) -> Answer:
        """The answer that tells of `problem`."""


@final
class Admission(Generic[Answer]):
    """A request under way, from its head to its answer.

    The carrier calls `open`, then `receive` for each piece of the body, then `complete`; and `abandon` if the
    client leaves. Calls after the end do nothing.

    Args:
        service: the application's.
        call: the request.
        respond: takes the answer. Called once, possibly from within a method of this class; never after
            `abandon`.
    """

    def __init__(self, service: Service, call: Call[Answer], respond: Callable[[Answer], None]) -> None:
        self._service = service
        self._call = call
        self._respond = respond
        self._over = False
        self._chunks: list[bytes] = []
        self._size = 0
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._job: Job | None = None
        self._manifest: Manifest | None = None
        self._results: Sequence[Result] = ()
        self._began = service.telemetry.begin()

    def open(self) -> None:
        """The head is there. A request that is turned away before its body is read costs little."""
        service, call = self._service, self._call
        settings = service.settings
        try:
            service.lifecycle.check_serving()
            if settings.protect_predict:
                require_key(call.caller(), settings)
            seconds, asked = settings.timeout_ms / 1000, call.timeout()
            if asked is not None and asked < seconds:
                seconds = asked
            self._deadline = self._began + seconds
            scheduler = call.find_engine(service.registry)
            if scheduler is not None:
                scheduler.check_room()
            if call.announced_bytes() > settings.max_body_bytes:
                raise body_too_large(settings.max_body_bytes)
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        except Exception as error:
            self._refuse(error)

    def receive(self, chunk: bytes) -> None:
        """A piece of the body has come."""
        if self._over:
            return
        service, size = self._service, len(chunk)
        try:
            if self._size + size > service.settings.max_body_bytes:
                raise body_too_large(service.settings.max_body_bytes)
            service.body_memory.reserve(size)
            self._size += size
            self._chunks.append(chunk)
        except Problem as problem:
            self._refuse(problem)

    def complete(self) -> None:
        """All of the body has come."""
        if self._over:
            return
        service, call, chunks = self._service, self._call, self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        try:
            self._scheduler, images, top = call.read(body, service.registry)
            self._manifest = self._scheduler.engine.manifest
            if len(images) > service.settings.max_images:
                raise Problem(
                    "too-many-images", f"{len(images)} images; the limit is {service.settings.max_images}"
                )
            self._job = self._scheduler.submit(images, self._deadline, self._done, top=top)
        except Exception as error:
            self._refuse(error)

    def abandon(self) -> None:
        """The client is gone, or stopped waiting because its deadline passed."""
        if self._over:
            return
        expired = time.monotonic() >= self._deadline
        if self._job is not None:
            self._scheduler.drop(self._job, "expired" if expired else "cancelled")
        if expired:
            self._end("expired", "deadline-exceeded")
        else:
            self._end("cancelled", "disconnected")

    def _expire(self) -> None:
        if self._job is None:
            seconds = self._deadline - self._began
            self._refuse(Problem("body-timeout", f"the body had not arrived after {seconds:g} s"))
        else:
            self._scheduler.drop(self._job, "expired")
            self._refuse(deadline_exceeded())

    def _done(self, outcome: list[Result] | Problem) -> None:
        if isinstance(outcome, Problem):
            self._refuse(outcome)
            return
        assert self._manifest is not None
        self._results = outcome
        try:
            answer = self._call.render(outcome, self._manifest)
        except Exception as error:
            self._refuse(error)
        else:
            self._close(answer, "ok", "")

    def _refuse(self, error: Exception) -> None:
        if not isinstance(error, Problem):
            log.error("a request failed", exc_info=error)
            error = internal_error()
        self._close(self._call.refusal(error), outcome_of(error), error.name)

    def _close(self, answer: Answer, outcome: str, reason: str) -> None:
        try:
            self._respond(answer)
        except Exception:
            log.exception("an answer could not be handed over")
        self._end(outcome, reason)

    def _end(self, outcome: str, reason: str) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        service, call = self._service, self._call
        # The job knows this object: a cycle would keep the body until the next garbage collection.
        self._job = self._timer = None
        self._chunks = []
        service.body_memory.release(self._size)
        key = RequestKey(call.protocol, outcome, reason)
        service.telemetry.end(key)
        if service.telemetry.observers:
            headers = call.caller().headers
            service.telemetry.tell(Ended(key, headers, self._began, self._manifest, self._results))
