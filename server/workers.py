"""A slot's thread: it opens the slot, takes batches from the backlog, and hands outcomes over."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext

from runtime.engine import BRIEF_S, Engine, Slot
from runtime.finite import NOT_FINITE, all_finite, finite_rows
from runtime.health import EngineAwayError
from runtime.manifest import EngineError
from runtime.priority import giving_way
from runtime.ranking import ranked
from server.backlog import Backlog
from server.decoding import Decoder
from server.jobs import Computed, Failed, Image, Outcome
from server.mailbox import Mailbox
from server.problems import Problem

log = logging.getLogger("trimrt.scheduler")


class Worker:
    """One slot of an engine, from its opening to its closing.

    Args:
        engine: opens the slot.
        backlog: where batches come from; the worker ends when it is closed.
        outcomes: where they go.
        decoder: for images that come encoded.
        gives_way: run at a lower priority than the process's other threads.
        reserve: leave large requests to other workers while small ones come among them.

    Attributes:
        opened: resolved when the slot is open and warm, or with the exception if it cannot be opened.
        reserve: see above.
    """

    def __init__(
        self,
        engine: Engine,
        backlog: Backlog,
        outcomes: Mailbox[Outcome],
        decoder: Decoder,
        *,
        gives_way: bool,
        reserve: bool = False,
    ) -> None:
        self.opened: Future[None] = Future()
        self._engine = engine
        self._backlog = backlog
        self._outcomes = outcomes
        self._decoder = decoder
        self._gives_way = gives_way
        self.reserve = reserve

    def run(self) -> None:
        """Work until the backlog is closed, on the calling thread."""
        try:
            slot = self._engine.open_slot()
        except Exception as error:
            # A traceback knows its frames, and they the error: such a cycle would keep the engine.
            self.opened.set_exception(error.with_traceback(None))
            return
        self._slot = slot
        with closing(slot), giving_way() if self._gives_way else nullcontext():
            self.opened.set_result(None)
            self._work()
        del self._slot  # which would keep its memory

    def _work(self) -> None:
        batch = self._backlog.wait(reserve=self.reserve)
        while batch:
            outcome = self.run_batch(batch)
            # The event loop holds the interpreter's lock while it answers. With its next batch in hand this
            # slot can decode meanwhile.
            batch = self._backlog.take(reserve=self.reserve)
            if outcome is not None:
                # If other slots compute, their cores are busy: the event loop had better use this one.
                self._outcomes.leave(outcome, on_this_core=not self._backlog.others_sleep)
                del outcome  # frees the images and outputs while the slot waits
            batch = batch or self._backlog.wait(reserve=self.reserve)

    def run_batch(self, batch: list[Image]) -> Outcome | None:
        """Decode and infer; None if every image failed alone, which the event loop is told at once.

        Called on this worker's thread, or on the event loop's while this worker waits for images.
        """
        try:
            images = self._fill(self._slot, batch)
            return self._infer(self._slot, images) if images else None
        except EngineAwayError as error:
            return Failed(batch, Problem("not-ready", str(error), headers={"Retry-After": "1"}))
        except Exception as error:
            log.exception("a batch of %d images failed", len(batch))
            problem = Problem("inference-failed", f"the engine failed: {error}")
            return Failed(batch, problem, error if isinstance(error, EngineError) else None)

    def _fill(self, slot: Slot, batch: list[Image]) -> list[Image]:
        """Write the pixels of `batch` into the slot, and of images that join it; those that have a row."""
        images: list[Image] = []
        joining: Sequence[Image] = batch
        while joining:
            for image in joining:
                row = slot.pixels[len(images)]
                try:
                    pixels = self._decoder.decode(image, row)
                except Problem as problem:
                    self._outcomes.leave(Failed([image], problem))
                else:
                    if pixels is not row:
                        row[:] = pixels
                    images.append(image)
            # While the slot decoded, clients that were just answered may have sent their next image.
            joining = self._backlog.join(len(batch))
            batch += joining
        return images

    def _infer(self, slot: Slot, images: list[Image]) -> Computed | None:
        started = time.monotonic()
        count = len(images)
        alone = self._backlog.others_sleep and not self._backlog.waiting and self._engine.alone_s > BRIEF_S
        # Engines may have a minimum batch; the remaining rows are stale and ignored.
        outputs = slot.infer(max(count, self._engine.manifest.batch.min), alone=alone)
        finished = time.monotonic()
        # The slot's next batch overwrites its arrays.
        probabilities, logits = outputs.probabilities[:count].copy(), outputs.logits[:count].copy()
        if not all_finite(logits, probabilities):
            finite = finite_rows(logits, probabilities)
            self._fail([image for image, fine in zip(images, finite, strict=True) if not fine])
            images = [image for image, fine in zip(images, finite, strict=True) if fine]
            if not images:
                return None
            probabilities, logits = probabilities[finite], logits[finite]
        return Computed(
            images=images,
            probabilities=probabilities,
            logits=logits,
            # Rank on this thread: NumPy releases the GIL, and on the event loop it would block.
            order=ranked(logits, max(image.job.top for image in images)),
            started=started,
            finished=finished,
            device={stage: milliseconds / 1000 for stage, milliseconds in outputs.timings_ms.items()},
        )

    def _fail(self, images: list[Image]) -> None:
        """Tell of images whose outputs are no numbers; the rest of their batch is answered."""
        log.error("%d images failed: %s", len(images), NOT_FINITE)
        for image in images:
            problem = Problem("inference-failed", NOT_FINITE, extra={"image": image.index})
            self._outcomes.leave(Failed([image], problem))
