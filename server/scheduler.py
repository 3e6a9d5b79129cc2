"""From admitted images to results: decode, queue, batch, infer, reassemble.

One `Scheduler` serves one engine. Requests enter and leave on the event loop's thread. Every slot is
opened, filled, run and closed by a thread of its own, and the event loop is woken once per batch, not
once per image. For an engine on a device, other threads decode meanwhile; where decoding and inference
need the same cores, a slot's thread decodes its images itself, straight into the batch.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.preprocessing import ImageError, Pixels, load_pixels
from runtime.engine import Engine, Slot
from runtime.ranking import ranked
from runtime.threads import give_way, run_in_engine_thread
from server.batching import Shares, collate
from server.decoding import DecodePool
from server.mailbox import Mailbox
from server.problems import Problem, image_problem
from server.stats import EngineStats

log = logging.getLogger("trimrt.scheduler")

_RATE_SMOOTHING = 0.2  # weight of the newest batch in the moving average of seconds per image


class Result(NamedTuple):
    """One image's answer, and when its stages began and ended (seconds, by `time.monotonic`).

    Attributes:
        probabilities: `float32` of shape `(classes,)`.
        logits: same shape and dtype.
        order: `int64`, the classes by falling logit, equal ones by number: as many as the request asked for,
            or more.
        batch_size: images in the batch it rode in.
        admitted: when the request was.
        decoding: when a thread began to decode it.
        decoded: when its pixels were there.
        running: when its batch began.
        computed: when its batch ended.
        delivered: when the result was handed back.
        device: seconds of the batch's stages on the device, by name; empty where there is none to ask.
    """

    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    order: NDArray[np.int64]
    batch_size: int
    admitted: float
    decoding: float
    decoded: float
    running: float
    computed: float
    delivered: float
    device: Mapping[str, float]

    @property
    def decode(self) -> float:
        """Time of decoding."""
        return self.decoded - self.decoding

    @property
    def queue(self) -> float:
        """Time spent waiting: to be decoded, and for the batch to begin."""
        return self.decoding - self.admitted + self.running - self.decoded

    @property
    def inference(self) -> float:
        """The batch's time in the engine."""
        return self.computed - self.running

    @property
    def total(self) -> float:
        """From admission to the result."""
        return self.delivered - self.admitted

    def stages(self) -> list[tuple[str, float, float]]:
        """What happened when: name, begin and end."""
        return [
            ("queue for decoding", self.admitted, self.decoding),
            ("decode", self.decoding, self.decoded),
            ("queue for inference", self.decoded, self.running),
            ("inference", self.running, self.computed),
        ]


Done: TypeAlias = "Callable[[list[Result] | Problem], None]"


class Job:
    """The images of one request."""

    __slots__ = ("admitted", "deadline", "done", "over", "remaining", "results", "top")

    def __init__(self, count: int, admitted: float, deadline: float, done: Done, top: int) -> None:
        self.admitted = admitted
        self.deadline = deadline
        self.done = done
        self.results: list[Result | None] = [None] * count
        self.remaining = count
        self.top = top
        self.over = False  # answered or dropped; also read by the decoding and slot threads


class _Image:
    """One image on its way."""

    __slots__ = ("data", "decoded", "decoding", "index", "job", "ready_at")

    def __init__(self, job: Job, index: int, data: bytes | Pixels) -> None:
        self.job = job
        self.index = index
        self.data = data  # pixels, once it is decoded
        self.decoding = job.admitted
        self.decoded = job.admitted
        self.ready_at = job.admitted  # joined the queue for a slot

    def is_dead(self, now: float) -> bool:
        return self.job.over or now >= self.job.deadline


def deadline_exceeded() -> Problem:
    """What is answered when the deadline passes."""
    return Problem("deadline-exceeded", "the deadline passed before the result was there")


def _settle(future: asyncio.Future[list[Result] | Problem], outcome: list[Result] | Problem) -> None:
    if not future.done():
        future.set_result(outcome)


class Scheduler:
    """Bounded queue, batcher and slot threads of one engine."""

    def __init__(
        self,
        engine: Engine,
        decoder: DecodePool,
        stats: EngineStats,
        *,
        queue_limit: int,
        max_pixels: int,
        max_batch_delay: float = 0.0,
    ) -> None:
        self.engine = engine
        self.stats = stats
        self.pending = 0  # admitted and not yet answered or abandoned
        self.queue_limit = queue_limit
        self._decoder = decoder
        self._spec = engine.manifest.preprocessing
        self._max_pixels = max_pixels
        self._max_batch = engine.best_batch
        self._decodes_in_slot = engine.on_cpu
        self._shares = Shares(engine.slots, engine.run_sizes, engine.best_batch)
        self._delay = max_batch_delay
        self._waiting: deque[_Image] = deque()
        self._lock = threading.Lock()
        self._sleeping: list[threading.Lock] = []  # of every slot that waits; released to wake it
        self._retired = False  # admits no more
        self._closing = False  # the slots are to end
        self._slots: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop
        self._mailbox: Mailbox  # of the slots
        self._idle: asyncio.Event  # set once retired and empty
        self._seconds_per_image = 0.0
        self._last_delivery = 0.0

    # --- on the event loop -------------------------------------------------------------------------

    async def start(self) -> None:
        """Open and warm every slot.

        Raises:
            Exception: whatever the engine raised; the slots that did open are closed again.
        """
        self._loop = asyncio.get_running_loop()
        self._mailbox = Mailbox(self._loop)
        self._idle = asyncio.Event()
        opened: list[asyncio.Future[None]] = [self._loop.create_future() for _ in range(self.engine.slots)]
        self._slots = [
            self._loop.create_task(run_in_engine_thread(partial(self._run_slot, future))) for future in opened
        ]
        outcomes = await asyncio.gather(*opened, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                await self.close()
                raise outcome

    def check_room(self, images: int = 1) -> None:
        """Make sure that `images` more fit the queue.

        Raises:
            Problem: `queue-full`, with `Retry-After` from the measured service rate.
        """
        if self.pending + images > self.queue_limit:
            seconds = max(1, math.ceil(self.pending * self._seconds_per_image))
            raise Problem(
                "queue-full",
                f"{self.pending} images are waiting or running, the limit is {self.queue_limit}; "
                f"try again in {seconds} s",
                headers={"Retry-After": str(seconds)},
            )

    def submit(self, images: Sequence[bytes | Pixels], deadline: float, done: Done, *, top: int = 0) -> Job:
        """Admit `images`, to run them through the engine in as many batches as it takes.

        Args:
            images: encoded image files, or `uint8` pixels of the engine's input shape.
            deadline: when the answer will be of no use (by `time.monotonic`): what has not begun by then
                never will. To be told of it, `drop` the job.
            done: called once, on the event loop's thread and never from within `submit`, with one result per
                image in their order, or with the problem: `image-damaged`, `unsupported-media-type` or
                `image-too-large` for an image that cannot be decoded, or `inference-failed`.
            top: how many classes of each image to rank.

        Raises:
            Problem: `queue-full` or `not-ready`; nothing was admitted.
        """
        if self._retired:
            raise Problem(
                "not-ready", "the engine is being unloaded; try again", headers={"Retry-After": "1"}
            )
        self.check_room(len(images))
        job = Job(len(images), time.monotonic(), deadline, done, top)
        self.pending += len(images)
        ready = []
        for index, data in enumerate(images):
            image = _Image(job, index, data)
            if self._decodes_in_slot or not isinstance(data, bytes):
                ready.append(image)
            else:
                self._decoder.submit(partial(self._decode_and_enqueue, image))
        self._enqueue(ready)
        return job

    def drop(self, job: Job, reason: str) -> None:
        """Let `job` go, if it is still under way: it will not be told, and what has not begun never will."""
        if not job.over:
            self.stats.drop(reason, job.remaining)
            self._leave(job)

    async def infer(self, images: Sequence[bytes | Pixels], timeout: float, *, top: int = 0) -> list[Result]:
        """Run `images` through the engine.

        Cancelling the call drops its images.

        Args:
            images: see `submit`.
            timeout: seconds until the answer is of no use.
            top: how many classes of each image to rank.

        Returns:
            One result per image, in their order.

        Raises:
            Problem: those of `submit` and of its `done`, and `deadline-exceeded`.
        """
        future: asyncio.Future[list[Result] | Problem] = self._loop.create_future()
        job = self.submit(images, time.monotonic() + timeout, partial(_settle, future), top=top)
        timer = self._loop.call_later(timeout, lambda: _settle(future, deadline_exceeded()))
        try:
            outcome = await future
        except asyncio.CancelledError:
            self.drop(job, "cancelled")
            raise
        finally:
            timer.cancel()
        if isinstance(outcome, Problem):
            self.drop(job, "expired")
            raise outcome
        return outcome

    async def close(self) -> None:
        """Answer what was admitted, but admit no more; then close the slots and free the engine."""
        self._retired = True
        if self.pending:
            await self._idle.wait()
        with self._lock:
            self._closing = True
            self._wake(len(self._sleeping))
        await asyncio.gather(*self._slots)
        self._mailbox.close()
        await run_in_engine_thread(self.engine.close)

    def _leave(self, job: Job) -> None:
        """End `job`, and give back the queue room of what it still has under way."""
        job.over = True
        self._release(job.remaining)
        job.remaining = 0

    def _release(self, images: int) -> None:
        self.pending -= images
        if self.pending == 0 and self._retired:
            self._idle.set()

    def _fail(self, job: Job, problem: Problem) -> None:
        if not job.over:
            self._leave(job)
            job.done(problem)

    def _deliver(
        self,
        batch: list[_Image],
        probabilities: NDArray[np.float32],
        logits: NDArray[np.float32],
        order: NDArray[np.int64],
        started: float,
        finished: float,
        device: Mapping[str, float],
    ) -> None:
        now = time.monotonic()
        size = len(batch)
        for row, image in enumerate(batch):
            job = image.job
            if job.over:
                continue
            result = job.results[image.index] = Result(
                probabilities[row],
                logits[row],
                order[row],
                size,
                job.admitted,
                image.decoding,
                image.decoded,
                started,
                finished,
                now,
                device,
            )
            self.stats.image(result.decode, result.queue, result.inference, result.total, device)
            job.remaining -= 1
            self._release(1)
            if job.remaining == 0:
                job.over = True
                job.done([result for result in job.results if result is not None])
        self.stats.batch(size)
        self._measure_rate(size, started, now)

    def _measure_rate(self, images: int, started: float, now: float) -> None:
        # Slots overlap, and so may this batch and the one before: count only the time since then.
        seconds = (now - max(started, self._last_delivery)) / images
        self._last_delivery = now
        weight = _RATE_SMOOTHING if self._seconds_per_image else 1.0
        self._seconds_per_image += weight * (seconds - self._seconds_per_image)

    def _deliver_failure(self, batch: list[_Image], problem: Problem) -> None:
        for image in batch:
            self._fail(image.job, problem)

    # --- on any thread -----------------------------------------------------------------------------

    def _enqueue(self, images: list[_Image]) -> None:
        with self._lock:
            self._waiting.extend(images)
            self._wake(len(images))

    def _wake(self, slots: int) -> None:
        """Wake so many slots, those first that fell asleep last: their core's cache is warm."""
        for _ in range(min(slots, len(self._sleeping))):
            self._sleeping.pop().release()

    def _decode(self, image: _Image, out: Pixels | None = None) -> Pixels | None:
        """`image`'s pixels, in `out` if they had to be decoded; None after a failure, told to its request."""
        if not isinstance(image.data, bytes):
            return image.data
        image.decoding = time.monotonic()
        try:
            pixels = load_pixels(image.data, self._spec, max_pixels=self._max_pixels, out=out)
        except ImageError as error:
            problem = image_problem(error, image.index)
        except Exception:
            log.exception("decoding failed")
            problem = Problem("internal-error", "decoding failed")
        else:
            image.decoded = time.monotonic()
            return pixels
        self._loop.call_soon_threadsafe(self._fail, image.job, problem)
        return None

    # --- on a decoding thread ----------------------------------------------------------------------

    def _decode_and_enqueue(self, image: _Image) -> None:
        if image.is_dead(time.monotonic()):
            return
        pixels = self._decode(image)
        if pixels is not None:
            image.data = pixels
            image.ready_at = image.decoded
            self._enqueue([image])

    # --- on a slot's thread ------------------------------------------------------------------------

    def _run_slot(self, opened: asyncio.Future[None]) -> None:
        try:
            slot = self.engine.open_slot()
        except Exception as error:
            self._loop.call_soon_threadsafe(opened.set_exception, error)
            return
        try:
            if not self.engine.on_cpu:
                # TensorRT sets up an execution context and a CUDA graph for each size.
                for size in self.engine.run_sizes:
                    slot.infer(size)
        except Exception as error:
            self._loop.call_soon_threadsafe(opened.set_exception, error)
        else:
            self._loop.call_soon_threadsafe(opened.set_result, None)
            if self._decodes_in_slot:
                give_way()
            self._work(slot)
        finally:
            slot.close()

    def _work(self, slot: Slot) -> None:
        """Run batches until the scheduler is closing."""
        asleep = threading.Lock()
        asleep.acquire()
        batch = self._wait_for_batch(asleep)
        while batch:
            tell = self._run_batch(slot, batch)
            # Once told, the event loop takes the interpreter's lock for a while, and this slot, with its next
            # batch in hand, can decode meanwhile. Where none waits, those just answered are to know at once.
            # Of the last batch nothing stays in memory.
            batch = self._take_batch()[0] if self._waiting else []
            if tell is not None:
                self._tell(tell)
                del tell
            batch = batch or self._wait_for_batch(asleep)

    def _tell(self, call: Callable[[], None]) -> None:
        """Have the event loop make `call`."""
        if len(self._sleeping) < self.engine.slots - 1:
            self._mailbox.leave(call)
        else:  # no other slot computes: the event loop had better run on a core of its own
            self._loop.call_soon_threadsafe(call)

    def _take_batch(self, asleep: threading.Lock | None = None) -> tuple[list[_Image], float]:
        """The next batch, if there is one, and else when to ask again; until then a slot may be `asleep`."""
        with self._lock:
            now = time.monotonic()
            batch, _, wake_at = collate(self._waiting, now, self._batch_size(), self._delay)
            if batch:
                self._shares.begin(self.pending)
            elif asleep is not None and not self._closing:
                self._sleeping.append(asleep)
            return batch, wake_at

    def _wait_for_batch(self, asleep: threading.Lock) -> list[_Image]:
        """The next batch; empty once the scheduler is closing. The slot's lock `asleep` is held."""
        while True:
            batch, wake_at = self._take_batch(asleep)
            if batch or self._closing:
                return batch
            seconds = -1 if wake_at == math.inf else max(0.0, wake_at - time.monotonic())
            if not asleep.acquire(timeout=seconds):
                with self._lock:
                    if asleep in self._sleeping:
                        self._sleeping.remove(asleep)
                    else:  # woken at the same moment
                        asleep.acquire()

    def _batch_size(self) -> int:
        """The most images that a slot may take now."""
        if not self._decodes_in_slot or self._delay:
            return self._max_batch
        return self._shares.size(self.pending)

    def _late_images(self, batch: Sequence[_Image]) -> list[_Image]:
        """What may still join a `batch`, now that its images are decoded."""
        with self._lock:
            if not self._waiting or self._sleeping:
                return []
            now = time.monotonic()
            room = self._batch_size() - len(batch)
            return collate(self._waiting, now, room)[0] if room > 0 else []

    def _run_batch(self, slot: Slot, batch: list[_Image]) -> Callable[[], None] | None:
        """Decode and infer. What is returned tells those who wait, on the event loop's thread."""
        ready: list[_Image] = []
        try:
            late = batch
            while late:
                for image in late:
                    row = slot.pixels[len(ready)]
                    pixels = self._decode(image, row)
                    if pixels is not None:
                        if pixels is not row:
                            row[:] = pixels
                        ready.append(image)
                # Decoding takes a while, in which those just answered may have sent their next image.
                late = self._late_images(batch)
                batch += late
            if not ready:
                return None
            started = time.monotonic()
            alone = len(self._sleeping) == self.engine.slots - 1 and not self._waiting
            count = len(ready)
            # An engine may take no fewer than so many: the rest is what the slot held before.
            outputs = slot.infer(max(count, self.engine.manifest.batch.min), alone=alone)
            finished = time.monotonic()
            # The slot's arrays are overwritten by its next batch.
            probabilities, logits = outputs.probabilities[:count].copy(), outputs.logits[:count].copy()
            # Here, for NumPy lets other threads run meanwhile, and the event loop would wait long to go on.
            order = ranked(logits, max(image.job.top for image in ready))
            device = {stage: milliseconds / 1000 for stage, milliseconds in outputs.timings_ms.items()}
        except Exception as error:
            log.exception("a batch of %d images failed", len(batch))
            problem = Problem("inference-failed", f"the engine failed: {error}")
            return partial(self._deliver_failure, batch, problem)
        return partial(self._deliver, ready, probabilities, logits, order, started, finished, device)
