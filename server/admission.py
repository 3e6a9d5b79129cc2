"""The policy that every inference request meets, whatever protocol carries it.

In this order: the drain, the key and its rate, the deadline, the engine and the room in its queue, the size
of the body and the memory that all bodies share, the number of images, the size of the answer. Then the
outcome is counted, once.

A carrier (the HTTP parser, ASGI, a WebSocket, gRPC) hands the request over by plain calls on the event loop's
thread, and a `Call` parses it and renders the answer. A task, futures and further timers for each request
would cost the event loop more than all that is done here. Only what takes more than a few milliseconds, to
take a large body apart or to render a large answer, goes to a thread, one request at a time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Generic, TypeVar, cast, final

from models.preprocessing import Pixels
from runtime.batching import SMALL
from runtime.manifest import Manifest
from server.auth import Caller, require_inference_key, sent_client_key
from server.bodies import body_too_large, too_many_images
from server.jobs import Job, Result
from server.problems import Problem, internal_error
from server.registry import Registry
from server.scheduler import Scheduler, deadline_exceeded
from server.service import Service
from server.telemetry import Ended, RequestKey, outcome_of

log = logging.getLogger("trimrt")

Answer = TypeVar("Answer")
T = TypeVar("T")

_MOST_PIECES: Final = 16_384  # of a body, unless they are larger than the next
_LEAST_PIECE: Final = 256  # bytes
_MOST_RANKED: Final = 262_144  # classes in one answer, over all images
_SHORT_BODY: Final = 4_096  # bytes; to read a form of so many takes a tenth of a millisecond
_LARGE_ANSWER: Final = 8_192  # as many take some milliseconds to render
_LARGE_HASH: Final = 1 << 20  # bytes of images; as many take a millisecond to hash


class Call(ABC, Generic[Answer]):
    """One request as its protocol has it. A `Problem` that a method raises ends the request."""

    protocol: str  # see `RequestKey`
    fetched = 0  # bytes that `read` brought from elsewhere; they count as the body's

    @abstractmethod
    def caller(self) -> Caller:
        """Who calls."""

    @abstractmethod
    def timeout(self) -> float | None:
        """Seconds that the client wants to wait at most; None if it does not say."""

    def priority(self) -> str | None:
        """What the client says of it, `normal` or `low`; None if it says nothing."""
        return None

    def find_engine(self, registry: Registry) -> Scheduler | None:
        """The engine that the head names; None where only the body does."""
        return None

    def announced_bytes(self) -> int:
        """Size of the body by the head, which is also checked for the body's type; 0 if it does not say."""
        return 0

    @abstractmethod
    def is_slow_to_read(self, body: bytes) -> bool:
        """Whether `read` may take more than a few milliseconds."""

    @abstractmethod
    def read(
        self, body: bytes, registry: Registry, max_images: int
    ) -> tuple[Scheduler, Sequence[bytes | Pixels], int]:
        """The engine (which may have been switched since), the images, how many classes of each to rank.

        Called on the thread for large requests if it `is_slow_to_read`.
        """

    @abstractmethod
    def render(self, results: Sequence[Result], manifest: Manifest) -> Answer:
        """The answer; one result per image. Called on the thread for large requests if it is large."""

    @abstractmethod
    def refusal(self, problem: Problem) -> Answer:
        """The answer that tells of `problem`."""


@final
class Admission(Generic[Answer]):
    """A request under way, from its head to its answer.

    The carrier calls `open`, then `receive` for each piece of the body, then `complete`; or `refuse` if the
    body cannot be had; and `abandon` if the client leaves. Calls after the end do nothing.

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
        self._low = False  # of low priority
        self._key: bytes | None = None  # whose rate it counts to
        self._pieces: list[bytes] = []  # of the body
        self._size = 0
        self._whole = False  # all of the body has come
        self._away = False  # the thread for large requests has it
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._job: Job | None = None
        self._manifest: Manifest | None = None
        self._results: Sequence[Result] = ()
        self._images: Sequence[bytes | Pixels] = ()  # for observers
        self._began = service.telemetry.begin()

    def open(self) -> None:
        """The head is there. A request that is turned away before its body is read costs little."""
        service, call = self._service, self._call
        settings = service.settings
        try:
            service.lifecycle.check_serving()
            if settings.protect_predict:
                require_inference_key(call.caller(), settings)
            if service.rates is not None:
                self._key = sent_client_key(call.caller(), settings)
                service.rates.check(self._key)
            seconds, asked = settings.timeout_ms / 1000, call.timeout()
            if asked is not None and asked < seconds:
                seconds = asked
            self._deadline = self._began + seconds
            scheduler = call.find_engine(service.registry)
            if (priority := call.priority()) is not None:
                self._low = _is_low(priority)
            if scheduler is not None and scheduler.answers is None:
                scheduler.check_room(1, low=self._low)
            if call.announced_bytes() > settings.max_body_bytes:
                raise body_too_large(settings.max_body_bytes)
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        except Exception as error:
            self._refuse(error)

    def receive(self, chunk: bytes) -> None:
        """A piece of the body has come."""
        if self._over:
            return
        service, size, pieces = self._service, len(chunk), len(self._pieces)
        try:
            if self._size + size > service.settings.max_body_bytes:
                raise body_too_large(service.settings.max_body_bytes)
            if pieces >= _MOST_PIECES and self._size < pieces * _LEAST_PIECE:
                raise Problem("malformed-request", f"the body has more than {_MOST_PIECES:,} tiny pieces")
            service.body_memory.reserve(size)
            self._size += size
            self._pieces.append(chunk)
        except Problem as problem:
            self._refuse(problem)

    def arrive(self) -> None:
        """All of the body has come; `complete` follows when it is its turn."""
        self._whole = True

    def complete(self) -> None:
        """All of the body has come."""
        if self._over:
            return
        service, call = self._service, self._call
        body = b"".join(self._pieces)
        self._pieces = []
        self._whole = True
        try:
            registry, max_images = service.registry, service.settings.max_images
            read = partial(call.read, body, registry, max_images)
            if call.is_slow_to_read(body):
                self._off_loop(read, self._submit)
            elif len(body) > _SHORT_BODY:
                self._in_turn(read, self._submit)
            else:
                self._submit(read())
        except Exception as error:
            self._refuse(error)

    def _submit(self, request: tuple[Scheduler, Sequence[bytes | Pixels], int]) -> None:
        self._scheduler, images, self._top = request
        if fetched := self._call.fetched:
            self._service.body_memory.reserve(fetched)
            self._size += fetched
        self._manifest = self._scheduler.engine.manifest
        if len(images) > self._service.settings.max_images:
            raise too_many_images(self._service.settings.max_images)
        if len(images) * self._top > _MOST_RANKED:
            raise Problem(
                "invalid-parameter",
                f"{self._top} classes of {len(images)} images; the limit is {_MOST_RANKED:,} in one answer",
            )
        if self._service.rates is not None:
            self._service.rates.take(self._key, len(images))
        if self._service.telemetry.observers:
            self._images = images
        if (answers := self._scheduler.answers) is None:
            self._enqueue(images)
        elif sum(len(it) if isinstance(it, bytes) else it.nbytes for it in images) > _LARGE_HASH:
            self._off_loop(partial(answers.keys, images), partial(self._enqueue, images))
        else:
            self._enqueue(images, answers.keys(images))

    def _enqueue(self, images: Sequence[bytes | Pixels], keys: Sequence[bytes] = ()) -> None:
        self._job = self._scheduler.submit(
            images, self._deadline, self._done, top=self._top, low=self._low, keys=keys
        )

    def refuse(self, problem: Problem) -> None:
        """The body cannot be had."""
        if not self._over:
            self._refuse(problem)

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

    def supersede(self) -> None:
        """Something newer has come before its turn."""
        if not self._over:
            self._end("cancelled", "superseded")

    def _expire(self) -> None:
        if not self._whole:
            seconds = self._deadline - self._began
            self._refuse(Problem("body-timeout", f"the body had not arrived after {seconds:g} s"))
        else:
            if self._job is not None:
                self._scheduler.drop(self._job, "expired")
            self._refuse(deadline_exceeded())

    def _done(self, outcome: list[Result] | Problem) -> None:
        if isinstance(outcome, Problem):
            self._refuse(outcome)
            return
        assert self._manifest is not None
        self._results = outcome
        try:
            render = partial(self._call.render, outcome, self._manifest)
            if len(outcome) * self._top > _LARGE_ANSWER:
                self._off_loop(render, self._answer)
            elif len(outcome) > SMALL:
                self._in_turn(render, self._answer)
            else:
                self._answer(render())
        except Exception as error:
            self._refuse(error)

    def _answer(self, answer: Answer) -> None:
        self._close(answer, "ok", "")

    def _in_turn(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Do `work` in the event loop's next turn, so that small requests wait for less than all of it."""
        asyncio.get_running_loop().call_soon(self._take_turn, work, then)

    def _take_turn(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        if self._over:
            return
        try:
            with self._service.registry.decoding_limits.precedence:
                then(work())
        except Exception as error:
            self._refuse(error)

    def _off_loop(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Do `work` on the thread for large requests, `then` go on here, unless the request has ended."""
        self._away = True
        loop, executor = asyncio.get_running_loop(), self._service.large_work
        done = loop.run_in_executor(executor, self._unless_over, work)
        done.add_done_callback(partial(self._come_back, then))

    def _unless_over(self, work: Callable[[], T]) -> T | None:
        return None if self._over else work()

    def _come_back(self, then: Callable[[T], None], done: asyncio.Future[T | None]) -> None:
        self._away = False
        failure = done.exception()
        if self._over:
            self._service.body_memory.release(self._size)
            return
        if isinstance(failure, Exception):
            self._refuse(failure)
            return
        try:
            then(cast("T", done.result()))
        except Exception as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if not isinstance(error, Problem):
            log.error("a request failed", exc_info=error)
            error = internal_error()
        # Their frames hold the body, and whoever raises the problem again makes a cycle.
        error.__traceback__ = error.__context__ = None
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
        self._pieces = []
        if not self._away:
            service.body_memory.release(self._size)
        key = RequestKey(call.protocol, outcome, reason)
        service.telemetry.end(key)
        if service.telemetry.observers:
            ended = Ended(key, call.caller, self._began, self._manifest, self._results, self._images)
            self._images = ()
            service.telemetry.tell(ended)


def _is_low(priority: str) -> bool:
    if priority not in ("normal", "low"):
        raise Problem("invalid-parameter", f"X-Priority must be normal or low, not {priority[:40]!r}")
    return priority == "low"
