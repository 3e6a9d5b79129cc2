"""A request on its way through the scheduler: its job, the job's images, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.preprocessing import Pixels, Plan
from runtime.batching import SMALL
from runtime.manifest import EngineError
from server.problems import Problem


class Result(NamedTuple):
    """One image's answer, and when its stages began and ended (seconds, by `time.monotonic`).

    Attributes:
        probabilities: `float32` of shape `(classes,)`.
        logits: same shape and dtype.
        order: `int64`, class numbers by falling logit, ties by number; as many as the request asked for, or
            more.
        batch_size: images in its batch; 0: it was kept from before.
        admitted: the request was admitted.
        decoding: a thread began to decode the image.
        decoded: its pixels were there.
        running: its batch began.
        computed: its batch ended.
        delivered: the result reached the event loop.
        device: seconds of the batch's stages on the device, by name; empty for a CPU.
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
    def cached(self) -> bool:
        """Whether it was kept from before: nothing was computed, and its stages took no time."""
        return not self.batch_size

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
        if self.cached:
            return [("cache", self.admitted, self.delivered)]
        return [
            ("queue for decoding", self.admitted, self.decoding),
            ("decode", self.decoding, self.decoded),
            ("queue for inference", self.decoded, self.running),
            ("inference", self.running, self.computed),
        ]


Done: TypeAlias = "Callable[[list[Result] | Problem], None]"


class Job:
    """The images of one request. Only the event loop writes to it, but for `decoding_seconds`.

    Attributes:
        admitted: when the request was, by `time.monotonic`.
        deadline: when its answer becomes useless.
        done: takes the results, one per image, or the problem.
        top: how many classes of each image to rank.
        turn: the round of the backlog in which its first image has its turn; each further image has its own
            in the round after.
        behind: rounds that it gives way to others: it is of low priority if there are any.
        small: has so few images that it need not share with large ones; none of low priority is.
        results: by image; None for those still under way.
        remaining: how many are under way.
        over: answered or dropped; decoding and slot threads read it too.
        decoding_seconds: the most that decoding its images so far takes; `DecodingLimits` counts it.
    """

    __slots__ = (
        *("admitted", "behind", "deadline", "decoding_seconds", "done", "over"),
        *("remaining", "results", "small", "top", "turn"),
    )

    def __init__(
        self,
        count: int,
        admitted: float,
        deadline: float,
        done: Done,
        top: int,
        turn: int = 0,
        behind: int = 0,
    ) -> None:
        self.admitted = admitted
        self.deadline = deadline
        self.done = done
        self.top = top
        self.turn = turn + behind
        self.behind = behind
        self.small = count <= SMALL and not behind
        self.results: list[Result | None] = [None] * count
        self.remaining = count
        self.over = False
        self.decoding_seconds = 0.0


class Image:
    """One image of a job. One thread at a time has it: whoever takes it from a queue.

    Attributes:
        job: its request.
        index: its place among the job's images.
        data: the encoded file; pixels once it is decoded ahead of its batch.
        plan: how it will be decoded, where that was asked before.
        decoding: when a thread began to decode it, by `time.monotonic`.
        decoded: when its pixels were there.
        key: what its answer is kept by; None: it is not kept.
        ready_at: when it joined the backlog.
        turn: the round in which it leaves the backlog; see `Job`.
    """

    __slots__ = ("data", "decoded", "decoding", "index", "job", "key", "plan", "ready_at", "turn")

    def __init__(self, job: Job, index: int, data: bytes | Pixels) -> None:
        self.job = job
        self.index = index
        self.data = data
        self.key: bytes | None = None
        self.plan: Plan | None = None
        self.decoding = job.admitted
        self.decoded = job.admitted
        self.ready_at = job.admitted
        self.turn = job.turn + index

    def is_dead(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        return self.job.over or now >= self.job.deadline


class Computed(NamedTuple):
    """A batch's outputs, which a slot's thread hands to the event loop.

    Attributes:
        images: the batch, in the order of the rows.
        probabilities: `float32` of shape `(images, classes)`.
        logits: same shape and dtype.
        order: `int64`, class numbers of each image by falling logit; as many as any of the images needs.
        started: when the engine began, by `time.monotonic`.
        finished: when it ended.
        device: see `Result`.
    """

    images: Sequence[Image]
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    order: NDArray[np.int64]
    started: float
    finished: float
    device: Mapping[str, float]


class Failed(NamedTuple):
    """Images without a result, which a slot's or a decoding thread hands to the event loop.

    Attributes:
        images: of one or more jobs, each of which is answered with the problem.
        problem: why.
        error: what the engine raised, if it was the engine.
    """

    images: Sequence[Image]
    problem: Problem
    error: EngineError | None = None


Outcome: TypeAlias = Computed | Failed
