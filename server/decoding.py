"""From encoded images to pixels: on a slot's own thread, or ahead of it on a pool of threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from PIL import Image as PillowImage

from models.preprocessing import ImageError, Pixels, Plan, Preprocessing, plan_loading
from server.backlog import Backlog
from server.decoding_limits import DecodingLimits
from server.jobs import Failed, Image, Outcome
from server.mailbox import Mailbox
from server.problems import Problem, image_problem

log = logging.getLogger("trimrt.scheduler")

_BRIEF_S: Final = 250e-6
_BRIEF_BYTES: Final = 4 << 10  # a header of so many bytes is read in less than that, whatever is in it


@dataclass(frozen=True)
class Decoder:
    """Decodes images for one engine, on any thread.

    Attributes:
        spec: the engine's preprocessing.
        limits: on what decoding may take.
    """

    spec: Preprocessing
    limits: DecodingLimits

    def is_brief(self, image: Image) -> bool:
        """Whether `image` is decoded in less time than another thread needs to begin; it keeps its plan."""
        if not isinstance(image.data, bytes):
            return True
        if len(image.data) > _BRIEF_BYTES:
            return False
        try:
            image.plan = self._plan(image.data)
        except Exception:  # whoever decodes it says what is wrong
            return False
        return image.plan.cost.seconds <= _BRIEF_S

    def decode(self, image: Image, out: Pixels | None = None) -> Pixels:
        """The pixels of `image`; if it came as pixels, those.

        Args:
            image: takes the times of the decoding.
            out: where to write what is decoded; None: a new array.

        Raises:
            Problem: `image-damaged`, `unsupported-media-type`, `image-too-large`, `deadline-exceeded` or
                `internal-error`.
        """
        if not isinstance(image.data, bytes):
            return image.data
        limits = self.limits
        if not image.job.small:
            limits.precedence.give_way()
        image.decoding = time.monotonic()
        try:
            plan = image.plan or self._plan(image.data)
            cost = plan.cost
            limits.admit(cost, image.job)
            try:
                pixels = plan.load(out)
            finally:
                limits.release(cost)
        except ImageError as error:
            raise image_problem(error, image.index) from None
        except Problem:
            raise
        except Exception:
            log.exception("decoding failed")
            raise Problem("internal-error", "decoding failed") from None
        image.decoded = time.monotonic()
        return pixels

    def _plan(self, data: bytes) -> Plan:
        limits = self.limits
        return plan_loading(data, self.spec, max_pixels=limits.max_pixels, formats=limits.formats)

    def decode_ahead(self, image: Image, backlog: Backlog, outcomes: Mailbox[Outcome]) -> None:
        """Decode `image` before it joins `backlog`; a failure goes to `outcomes`."""
        if image.is_dead(time.monotonic()):
            return
        try:
            image.data = self.decode(image)
        except Problem as problem:
            outcomes.leave(Failed([image], problem))
        else:
            image.ready_at = image.decoded
            backlog.put([image])


class DecodePool:
    """A fixed number of threads taking work in order.

    Unlike `concurrent.futures` it makes no future per task: each task passes its result on itself, which
    saves a lock and a wake-up for every image.

    Attributes:
        threads: how many there are.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"trimrt-decode-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        # Pillow imports its readers on first use, which would delay a request.
        self.submit(PillowImage.init)

    def submit(self, task: Callable[[], object]) -> None:
        """Run `task`, which must not raise, on one of the threads."""
        self._tasks.put(task)

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
