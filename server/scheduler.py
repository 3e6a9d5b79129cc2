"""From admitted images to results, on the event loop's thread.

One `Scheduler` serves one engine. It hands images to the `Backlog`, from which each slot's `Worker` takes
batches on a thread of its own. Outcomes come back through the `Mailbox`, one message a batch. For an engine
on a device, a pool of threads decodes the images before they join the backlog; for an engine on the CPU,
whose inference needs the same cores, each worker decodes its own images straight into the batch.

To hand an image over and back takes longer than a small network's inference. So where that and the decoding
are brief, the event loop's thread runs an image that comes alone, with the slot of a worker that waits; where
the network is tiny, it runs all such images, in batches of what came since it last looked.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Final, cast

import numpy as np

from models.preprocessing import Pixels
from runtime.batching import Shares
from runtime.engine import BRIEF_S, Engine
from runtime.health import Health
from runtime.threads import run_in_engine_thread
from server.answers import EngineAnswers
from server.backlog import Backlog
from server.decoding import DecodePool, Decoder
from server.decoding_limits import DecodingLimits
from server.jobs import Computed, Done, Failed, Image, Job, Outcome, Result
from server.mailbox import Mailbox
from server.problems import Problem
from server.stats import EngineStats
from server.workers import Worker

LOW_ROUNDS: Final = 16
"""How many rounds of the backlog a request of low priority gives way to others."""

_TINY_S: Final = 250e-6  # an image alone; threads would wait longer for the interpreter's lock

_NOTHING: Final[Mapping[int, Result]] = {}
_RATE_SMOOTHING = 0.2  # weight of the newest batch in the moving average


class ServiceTime:
    """Seconds that an image takes, as a moving average over batches; 0 before the first."""

    def __init__(self) -> None:
        self.per_image = 0.0
        self._last_end = -math.inf

    def measure(self, images: int, began: float, ended: float) -> None:
        """Take a batch into account; times by `time.monotonic`, batches by their ends."""
        # Batches of several slots overlap: count only the time since the one before ended.
        seconds = (ended - max(began, self._last_end)) / images
        self._last_end = ended
        weight = _RATE_SMOOTHING if self.per_image else 1.0
        self.per_image += weight * (seconds - self.per_image)


def deadline_exceeded() -> Problem:
    """The answer when the deadline passes."""
    return Problem("deadline-exceeded", "the deadline passed before the result was there")


class Scheduler:
    """Admission to one engine's bounded queue, and delivery of its results.

    Args:
        engine: closed by `close`.
        pool: decodes for engines on a device; shared with other engines.
        stats: counts what becomes of the images.
        queue_limit: the most images that may have to run until a request is answered, its own among them.
        decoding_limits: on what decoding may take; shared with other engines.
        health: learns which batches failed.
        max_batch_delay: how long an idle slot waits for a fuller batch, seconds.
        linux_scheduling: see `runtime.priority`.
        answers: those of before; None: they are not kept.
    """

    def __init__(
        self,
        engine: Engine,
        pool: DecodePool,
        stats: EngineStats,
        *,
        queue_limit: int,
        decoding_limits: DecodingLimits,
        health: Health,
        max_batch_delay: float,
        linux_scheduling: bool,
        answers: EngineAnswers | None = None,
    ) -> None:
        self.engine = engine
        self.stats = stats
        self.queue_limit = queue_limit
        self.health = health
        self.answers = answers
        self._pool = pool
        self._decoder = Decoder(engine.manifest.preprocessing, decoding_limits)
        self._decodes_in_slot = engine.on_cpu
        self._linux_scheduling = linux_scheduling
        share = self._brief = engine.on_cpu and not max_batch_delay
        self._here: list[Image] = []  # those that the event loop's thread is to run
        self._backlog = Backlog(
            engine.slots,
            engine.best_batch,
            shares=Shares(engine.slots, engine.run_sizes, engine.best_batch) if share else None,
            delay=max_batch_delay,
        )
        self._service_time = ServiceTime()
        self._jobs: set[Job] = set()  # under way
        self._low: set[Job] = set()  # those of low priority
        self._retired = False  # admits no more
        self._workers: list[Worker] = []
        self._runs: list[asyncio.Task[None]] = []  # the workers'
        self._loop: asyncio.AbstractEventLoop
        self._outcomes: Mailbox[Outcome]
        self._idle: asyncio.Event  # set once retired and empty

    @property
    def pending(self) -> int:
        """Images admitted and not yet answered or abandoned."""
        return self._backlog.under_way

    @property
    def is_tiny(self) -> bool:
        """Whether the event loop's thread runs all images that are decoded in little time."""
        return self._brief and self.engine.alone_s <= _TINY_S

    @property
    def is_computing(self) -> bool:
        """Whether a slot is at work."""
        return self._backlog.sleeping < self.engine.slots

    async def start(self) -> None:
        """Open every slot; each is warm then.

        Raises:
            Exception: whatever the engine raised; the slots that did open are closed again.
        """
        self._loop = asyncio.get_running_loop()
        self._outcomes = Mailbox(self._loop, self._receive, sockets=self._linux_scheduling)
        self._idle = asyncio.Event()
        gives_way = self._linux_scheduling and self.engine.on_cpu
        self._workers = [
            Worker(
                self.engine,
                self._backlog,
                self._outcomes,
                self._decoder,
                gives_way=gives_way,
                reserve=not number,
            )
            for number in range(self.engine.slots)
        ]
        self._runs = [self._loop.create_task(run_in_engine_thread(worker.run)) for worker in self._workers]
        opened = (asyncio.wrap_future(worker.opened) for worker in self._workers)
        for outcome in await asyncio.gather(*opened, return_exceptions=True):
            if isinstance(outcome, BaseException):
                await self.close()
                raise outcome
        self._brief = self._brief and self.engine.alone_s <= BRIEF_S

    def check_room(self, images: int, *, low: bool = False) -> None:
        """Make sure that a request of so many images fits the queue.

        Requests take turns, so it waits for at most as many images of each other request as it has itself.
        Many images in few requests leave room for small requests. Those of `low` priority take no room from
        the others.

        Raises:
            Problem: `queue-full`, with `Retry-After` from the measured service time.
        """
        one = images == 1  # the sum is the same then, but takes longer
        if one:
            ahead = len(self._jobs) if low else len(self._jobs) - len(self._low)
        else:
            ahead = sum(min(job.remaining, images) for job in self._jobs if low or not job.behind)
        if ahead + images > self.queue_limit:
            seconds = max(1, math.ceil(self.pending * self._service_time.per_image))
            raise Problem(
                "queue-full",
                f"{ahead} images would run before it is answered, and {images} of its own; "
                f"the limit is {self.queue_limit}; try again in {seconds} s",
                headers={"Retry-After": str(seconds)},
            )

    def submit(
        self,
        images: Sequence[bytes | Pixels],
        deadline: float,
        done: Done,
        *,
        top: int,
        low: bool = False,
        keys: Sequence[bytes] = (),
    ) -> Job:
        """Admit `images`, to run them through the engine in as many batches as it takes.

        Args:
            images: encoded image files, or `uint8` pixels of the engine's input shape.
            deadline: when the answer becomes useless (by `time.monotonic`): images whose batch has not begun
                by then are skipped. That does not call `done`; the caller has to `drop` the job.
            done: called once, on the event loop's thread and never from within `submit`, with one result per
                image in their order, or with the problem: `image-damaged`, `unsupported-media-type` or
                `image-too-large` for an image that cannot be decoded, or `inference-failed`.
            top: how many classes of each image to rank.
            low: let others go first, and never run it on the event loop's thread.
            keys: of the images among `answers`, which are then looked up and kept there. What is found takes
                no room in the queue.

        Raises:
            Problem: `queue-full` or `not-ready`; nothing was admitted.
        """
        if self._retired:
            raise Problem(
                "not-ready", "the engine is being unloaded; try again", headers={"Retry-After": "1"}
            )
        found = self._find(keys, top) if keys else _NOTHING
        self.check_room(len(images) - len(found), low=low)
        turn, behind = self._backlog.round + 1, LOW_ROUNDS if low else 0
        job = Job(len(images), time.monotonic(), deadline, done, top, turn, behind)
        if keys:
            self._take_found(job, found)
            if not job.remaining:
                return job
        self._jobs.add(job)
        if low:
            self._low.add(job)
        self._backlog.expect(job)
        self._backlog.under_way += job.remaining
        ready, encoded = list[Image](), list[Image]()
        for index, data in enumerate(images):
            if index in found:
                continue
            image = Image(job, index, data)
            if keys:
                image.key = keys[index]
                image.turn = job.turn + len(ready) + len(encoded)  # those found take no turns
            if self._decodes_in_slot or not isinstance(data, bytes):
                ready.append(image)
            else:
                encoded.append(image)
        to_decode = iter(encoded)
        for _ in encoded[: self._pool.threads]:
            self._pool.submit(partial(self._decode_next, to_decode))
        if job.small and self._may_run_here() and all(map(self._decoder.is_brief, ready)):
            if not self._here:
                self._loop.call_soon(self._run_here)
            self._here += ready
        else:
            self._backlog.put(ready)
        return job

    def _find(self, keys: Sequence[bytes], top: int) -> dict[int, Result]:
        """The answers that are kept, by the number of the image."""
        assert self.answers is not None
        found = {}
        for index, key in enumerate(keys):
            if (result := self.answers.find(key, top)) is not None:
                found[index] = result
        return found

    def _take_found(self, job: Job, found: Mapping[int, Result]) -> None:
        for index, result in found.items():
            job.results[index] = result
        job.remaining -= len(found)
        self.stats.hits += len(found)
        self.stats.misses += job.remaining
        if found and self.stats.predictions is not None:
            self.stats.predictions.add(np.stack([result.probabilities for result in found.values()]))
        if not job.remaining:
            self._loop.call_soon(self._finish, job)

    def _may_run_here(self) -> bool:
        """Whether this thread had better run small requests' images than that of the worker that waits."""
        return self._brief and self._backlog.reserve_sleeps and (self.is_tiny or self._is_alone())

    def _is_alone(self) -> bool:
        """Whether one image is under way, large requests aside."""
        if self._backlog.mixed(time.monotonic()):
            return sum(job.remaining for job in self._jobs if job.small) == 1
        return self.pending == 1

    def _run_here(self) -> None:
        """Run the images that came since the event loop last looked, if they still had better be run here."""
        now = time.monotonic()
        images = [image for image in self._here if not image.is_dead(now)]
        self._here.clear()
        if not images:
            return
        if not self._may_run_here():
            self._backlog.put(images)
            return
        most = self.engine.best_batch
        if rest := images[most:]:
            self._here += rest
            self._loop.call_soon(self._run_here)
        reserve = next(worker for worker in self._workers if worker.reserve)
        if (outcome := reserve.run_batch(images[:most])) is not None:
            self._receive(outcome)

    def drop(self, job: Job, reason: str) -> None:
        """Abandon `job`, if it is still under way.

        Its `done` is never called, and images whose batch has not begun are skipped.
        """
        if not job.over:
            self.stats.dropped[reason] += job.remaining
            self._end(job)

    async def close(self) -> None:
        """Admit no more, answer what was admitted, then close the slots and free the engine."""
        self._retired = True
        if self.pending:
            await self._idle.wait()
        self._backlog.close()
        await asyncio.gather(*self._runs)
        self._outcomes.close()
        await run_in_engine_thread(self.engine.close)

    def _decode_next(self, encoded: Iterator[Image]) -> None:
        """Decode one of a request's images, on a thread of the pool, and line up again for the next.

        So no request has more tasks in the pool than there are threads, and requests take turns there too.
        """
        image = next(encoded, None)  # which several threads may ask for at once: it is a list's
        if image is not None:
            self._decoder.decode_ahead(image, self._backlog, self._outcomes)
            self._pool.submit(partial(self._decode_next, encoded))

    def _receive(self, outcome: Outcome) -> None:
        """Take an outcome from a slot's or a decoding thread."""
        with self._decoder.limits.precedence:
            self._take_in(outcome)

    def _take_in(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            if outcome.error is not None:
                self.health.failed(outcome.error)
            if outcome.problem.name == "inference-failed":
                self.stats.failed += len(outcome.images)
            for image in outcome.images:
                self._fail(image.job, outcome.problem)
        else:
            self._deliver(outcome)

    def _fail(self, job: Job, problem: Problem) -> None:
        if not job.over:
            self._end(job)
            job.done(problem)

    def _deliver(self, batch: Computed) -> None:
        now = time.monotonic()
        size = len(batch.images)
        self.stats.batches[size] += 1
        for row, image in enumerate(batch.images):
            job = image.job
            if job.over:
                continue
            result = job.results[image.index] = Result(
                probabilities=batch.probabilities[row],
                logits=batch.logits[row],
                order=batch.order[row],
                batch_size=size,
                admitted=job.admitted,
                decoding=image.decoding,
                decoded=image.decoded,
                running=batch.started,
                computed=batch.finished,
                delivered=now,
                device=batch.device,
            )
            self.stats.image(result.decode, result.queue, result.inference, result.total, batch.device)
            job.remaining -= 1
            self._release(1)
            if image.key is not None and self.answers is not None:
                self.answers.keep(image.key, result)
            if job.remaining == 0:
                self._jobs.remove(job)
                self._low.discard(job)
                self._finish(job)
        self.health.succeeded()
        self.stats.inference[size] += batch.finished - batch.started
        if self.stats.predictions is not None:
            self.stats.predictions.add(batch.probabilities)
        self._service_time.measure(size, batch.started, now)

    def _finish(self, job: Job) -> None:
        """Answer a job, all of whose results are there."""
        if not job.over:
            job.over = True
            job.done(cast("list[Result]", job.results))

    def _end(self, job: Job) -> None:
        """End `job` without results, and give back its room in the queue."""
        job.over = True
        self._jobs.discard(job)
        self._low.discard(job)
        self._release(job.remaining)

    def _release(self, images: int) -> None:
        self._backlog.under_way -= images
        if self._retired and not self.pending:
            self._idle.set()
