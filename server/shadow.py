"""A candidate engine on a share of another's live traffic, after the answer has gone out.

The accuracy gate goes on in production: a candidate that was as good on the validation images may not be so
on what really comes. Its images wait in a short queue of their own, from which one at a time is run while
nobody waits for the other engine; where there is no room the oldest is dropped, and counted.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from models.preprocessing import Pixels
from server.jobs import Result
from server.problems import Problem
from server.scheduler import Scheduler
from server.telemetry import Ended

_MOST_WAITING: Final = 64  # images
_PAUSE_S: Final = 0.005  # before an image is run: who was just answered may ask again


class _Waiting(NamedTuple):
    image: bytes | Pixels
    primary: Result


class ShadowCounts:
    """What became of a shadow's images.

    Attributes:
        compared: images that both engines have answered.
        agreed: those of them that got the same label.
        difference: sum of the absolute differences in the probability of the primary's label.
        primary_seconds: sum of the primary's inference over the compared images.
        seconds: sum of the candidate's.
        dropped: images that were passed over for lack of time.
        failed: images that the candidate failed on.
    """

    def __init__(self) -> None:
        self.compared = 0
        self.agreed = 0
        self.difference = 0.0
        self.primary_seconds = 0.0
        self.seconds = 0.0
        self.dropped = 0
        self.failed = 0

    @property
    def agreement(self) -> float:
        """Share of the compared images that got the same label; 0 before the first."""
        return self.agreed / self.compared if self.compared else 0.0

    def compare(self, primary: Result, candidate: Result) -> None:
        """Count an image that both have answered."""
        label = int(primary.logits.argmax())
        self.compared += 1
        self.agreed += label == int(candidate.logits.argmax())
        self.difference += abs(float(primary.probabilities[label]) - float(candidate.probabilities[label]))
        self.primary_seconds += primary.inference
        self.seconds += candidate.inference


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
        p99 = shadow.candidate.stats.stages["inference"].total.percentile(99)
        faults = []
        if counts.compared < self.images:
            faults.append(f"{counts.compared} images were compared, not {self.images}")
        if counts.agreement < self.agreement:
            faults.append(f"they agree on {counts.agreement:.2%} of the labels, not {self.agreement:.2%}")
        if self.p99_ms is not None and (p99 is None or 1000 * p99 > self.p99_ms):
            told = "unknown" if p99 is None else f"{1000 * p99:.2f} ms"
            faults.append(f"p99 of its inference is {told}, beyond {self.p99_ms:g} ms")
        if faults:
            raise Problem("engine-not-proven", "; ".join(faults))


class Shadow:
    """Runs `candidate` on a share of what `primary` answers; see `RequestObserver`.

    Args:
        candidate: another engine, with the same labels.
        primary: the engine that answers.
        share: of its images.

    Raises:
        Problem: `invalid-parameter`: the two cannot be compared.
    """

    def __init__(self, candidate: Scheduler, primary: Scheduler, share: float) -> None:
        if candidate is primary:
            raise Problem("invalid-parameter", "an engine cannot be its own shadow")
        if candidate.engine.manifest.labels != primary.engine.manifest.labels:
            raise Problem("invalid-parameter", "the two engines have other labels, and cannot be compared")
        self.candidate = candidate
        self.primary = primary
        self.share = share
        self.counts = ShadowCounts()
        self._waiting: deque[_Waiting] = deque()
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def record(self, request: Ended) -> None:
        """Take a share of the images that the primary has just answered."""
        if request.manifest is not self.primary.engine.manifest or not request.results:
            return
        for image, result in zip(request.images, request.results, strict=True):
            if not result.cached and random.random() < self.share:  # the same image proves nothing more
                self._waiting.append(_Waiting(image, result))
        while len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self.counts.dropped += 1
        self._later()

    def close(self) -> None:
        """Run no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()

    def _later(self) -> None:
        if self._waiting and self._timer is None and not self._running and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._run)

    def _run(self) -> None:
        """Run the newest image, if nobody waits for the primary."""
        self._timer = None
        if not self._waiting or self._closed:
            return
        if self.primary.pending or self.candidate.pending:
            self._later()
            return
        waiting = self._waiting.pop()

        def done(outcome: list[Result] | Problem) -> None:
            self._running = False
            if isinstance(outcome, Problem):
                self.counts.failed += 1
            else:
                self.counts.compare(waiting.primary, outcome[0])
            self._later()

        self._running = True
        try:
            self.candidate.submit([self._fit(waiting.image)], math.inf, done, top=0, aside=True)
        except Problem:
            self._running = False
            self.counts.dropped += 1

    def _fit(self, image: bytes | Pixels) -> bytes | Pixels:
        """The image, if the candidate takes it: pixels have the size that the primary takes.

        Raises:
            Problem: `invalid-parameter`.
        """
        spec = self.candidate.engine.manifest.preprocessing
        if not isinstance(image, bytes) and image.shape != (spec.height, spec.width, 3):
            raise Problem("invalid-parameter", "the candidate takes pixels of another size")
        return image
