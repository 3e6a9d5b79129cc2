"""A candidate engine on a share of another's live traffic, after the answer has gone out.

The accuracy gate goes on in production: a candidate that was as good on the validation images may not be so
on what really comes. Its images wait in a short queue of their own, from which one at a time is run while
nobody waits for any engine; what there is no room for is dropped, and counted. While requests follow
each other closely it runs so seldom that fewer than one in a hundred meets it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.preprocessing import Pixels
from runtime.histogram import Histogram
from server.jobs import Result
from server.problems import Problem
from server.scheduler import Scheduler
from server.telemetry import Ended

_MOST_WAITING: Final = 64  # images
_MOST_HELD: Final = 64 << 20  # bytes of them
_PAUSE_S: Final = 0.005  # before an image is run: who was just answered may ask again
_SPARED: Final = 200  # times as long as an image takes: what p99 is about are a hundredth of the requests
_MOST_UNSORTED: Final = 1000  # durations


class _Waiting(NamedTuple):
    """An image, its size in bytes, and what the primary said of it; no more of its result is held.

    Attributes:
        image: the encoded file, or pixels.
        size: of it, bytes.
        label: number of the likeliest class.
        probability: of that class.
        seconds: see `Result.inference`.
    """

    image: bytes | Pixels
    size: int
    label: int
    probability: float
    seconds: float


class ShadowCounts:
    """What became of a shadow's images: each was compared, dropped or failed, or still waits.

    Attributes:
        compared: images that both engines have answered.
        agreed: those of them that got the same label.
        difference: sum of the absolute differences in the probability of the primary's label.
        dropped: images that were passed over for lack of time.
        failed: images that the candidate failed on.
        waiting: images that wait for the candidate, or that it runs.
    """

    def __init__(self) -> None:
        self.compared = 0
        self.agreed = 0
        self.difference = 0.0
        self.dropped = 0
        self.failed = 0
        self.waiting = 0
        self._primary, self._candidate = Histogram(), Histogram()
        self._unsorted: list[tuple[float, float]] = []

    @property
    def agreement(self) -> float:
        """Share of the images with the same label, which what failed has not; 0 before the first."""
        return self.agreed / tried if (tried := self.compared + self.failed) else 0.0

    @property
    def inference(self) -> tuple[Histogram, Histogram]:
        """How long the compared images' batches took, the primary's and the candidate's."""
        if self._unsorted:
            primary, candidate = zip(*self._unsorted, strict=True)
            self._unsorted.clear()
            self._primary.add(primary)
            self._candidate.add(candidate)
        return self._primary, self._candidate

    def take(self) -> None:
        """Count an image that waits from now on."""
        self.waiting += 1

    def drop(self) -> None:
        """Count one that is passed over."""
        self.waiting -= 1
        self.dropped += 1

    def fail(self) -> None:
        """Count one that the candidate failed on."""
        self.waiting -= 1
        self.failed += 1

    def compare(self, primary: _Waiting, candidate: Result) -> None:
        """Count one that both have answered."""
        self.waiting -= 1
        self.compared += 1
        self.agreed += primary.label == int(candidate.logits.argmax())
        self.difference += abs(primary.probability - float(candidate.probabilities[primary.label]))
        self._unsorted.append((primary.seconds, candidate.inference))
        if len(self._unsorted) == _MOST_UNSORTED:
            _ = self.inference


class Rule(BaseModel):
    """What a candidate has to show before it is promoted."""

    model_config = ConfigDict(extra="forbid")

    images: int = Field(default=1000, ge=1, description="compared at least")
    agreement: float = Field(default=0.98, ge=0, le=1, description="least share with the same label")
    p99_ms: float | None = Field(default=None, gt=0, description="most that its inference may take at p99")

    def check(self, shadow: Shadow) -> None:
        """Let a candidate pass that has shown it.

        Raises:
            Problem: `engine-not-proven`.
        """
        counts = shadow.counts
        p99 = counts.inference[1].percentile(99)
        faults = []
        if counts.compared < self.images:
            faults.append(f"{counts.compared} images were compared, not {self.images}")
        if counts.agreement < self.agreement:
            faults.append(f"they agree on {counts.agreement:.2%} of the labels, not {self.agreement:.2%}")
        if self.p99_ms is not None and (p99 is None or 1000 * p99 > self.p99_ms):
            told = "unknown" if p99 is None else f"{1000 * p99:.2f} ms"
            faults.append(f"p99 of its inference is {told}, beyond {self.p99_ms:g} ms")
        if (lost := shadow.candidate.health.lost) is not None:
            faults.append(lost)
        if faults:
            raise Problem("engine-not-proven", "; ".join(faults))


class Shadow:
    """Runs `candidate` on a share of what `primary` answers; see `RequestObserver`.

    Args:
        candidate: another engine, with the same labels.
        primary: the engine that answers.
        share: of its images.
        busy: whether anybody waits for an engine.

    Raises:
        Problem: `invalid-parameter`: the two cannot be compared.
    """

    def __init__(
        self, candidate: Scheduler, primary: Scheduler, share: float, busy: Callable[[], bool]
    ) -> None:
        if candidate is primary:
            raise Problem("invalid-parameter", "an engine cannot be its own shadow")
        if candidate.engine.manifest.labels != primary.engine.manifest.labels:
            raise Problem("invalid-parameter", "the two engines have other labels, and cannot be compared")
        self.candidate = candidate
        self.primary = primary
        self.share = share
        self.counts = ShadowCounts()
        self._busy = busy
        self._waiting: deque[_Waiting] = deque()
        self._held = 0  # bytes of those
        self._answered = 0.0  # when the primary last was, by `time.monotonic`
        self._spared = 0.0  # until when it is not run between requests
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def record(self, request: Ended) -> None:
        """Take a share of the images that the primary has just answered."""
        if request.manifest is not self.primary.engine.manifest or not request.results:
            return
        self._answered = request.results[-1].delivered
        for image, result in zip(request.images, request.results, strict=True):
            if result.cached or random.random() >= self.share:  # the same image proves nothing more
                continue
            if len(self._waiting) < _MOST_WAITING:
                self._take(image, result)
            else:
                self.counts.dropped += 1
        while self._held > _MOST_HELD:
            self._held -= self._waiting.popleft().size
            self.counts.drop()
        self._later()

    def close(self) -> None:
        """Run no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        while self._waiting:
            self._waiting.pop()
            self.counts.drop()

    def _take(self, image: bytes | Pixels, result: Result) -> None:
        if isinstance(image, np.ndarray):
            image = image.copy()  # it may be a small part of a large body, all of which it would hold
        size = len(image) if isinstance(image, bytes) else image.nbytes
        label = int(result.logits.argmax())
        probability = float(result.probabilities[label])
        self._waiting.append(_Waiting(image, size, label, probability, result.inference))
        self._held += size
        self.counts.take()

    def _later(self) -> None:
        if self._waiting and self._timer is None and not self._running and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._run)

    def _run(self) -> None:
        """Run the newest image, if nobody waits for an engine."""
        self._timer = None
        if not self._waiting or self._closed:
            return
        now = time.monotonic()
        if self._busy() or now < min(self._answered + _PAUSE_S, self._spared):
            self._later()
            return
        waiting = self._waiting.pop()
        self._held -= waiting.size

        def done(outcome: list[Result] | Problem) -> None:
            self._running = False
            if isinstance(outcome, Problem):
                self.counts.fail()
            else:
                self.counts.compare(waiting, outcome[0])
            ended = time.monotonic()
            self._spared = ended + _SPARED * (ended - now)
            self._later()

        if not self._fits(waiting.image):
            self.counts.fail()
            self._later()
            return
        self._running = True
        try:
            # Low priority also keeps it off the event loop's thread, unless that takes less than a hand-over.
            low = not self.candidate.is_tiny
            self.candidate.submit([waiting.image], math.inf, done, top=0, low=low)
        except Problem:
            self._running = False
            self.counts.drop()
            self._later()

    def _fits(self, image: bytes | Pixels) -> bool:
        """Whether the candidate takes the image: pixels have the size that the primary takes."""
        spec = self.candidate.engine.manifest.preprocessing
        return isinstance(image, bytes) or image.shape == (spec.height, spec.width, 3)
