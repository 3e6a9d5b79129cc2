"""Images that wait for a slot: handed from the event loop and the decoding threads to the slots' threads.

Requests take turns: in each round, every request under way has one image taken. So a request of one image
waits for one image of each other request, however many they have. And while small requests come among
large ones, one slot leaves the large ones to the others. Requests of low priority are as large ones, and give
way to some rounds of the others, but not for ever.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter

from runtime.batching import Shares, collate
from server.jobs import Image, Job

_turn = attrgetter("turn")
_is_small = attrgetter("job.small")


class Backlog:
    """A queue of images from which each slot takes batches; safe to use from any thread.

    Args:
        slots: of the engine.
        most: the most images in a batch.
        shares: divides the images among the slots; None: each batch may have `most`.
        delay: how long an image may be held back for a fuller batch, seconds.

    Attributes:
        under_way: images admitted and not yet answered or abandoned; only the event loop writes it.
        round: the one under way, which is the turn of the image that was taken last.
    """

    def __init__(self, slots: int, most: int, *, shares: Shares | None = None, delay: float = 0.0) -> None:
        self.under_way = 0
        self.round = 0
        self._slots = slots
        self._most = most
        self._shares = shares
        self._delay = delay
        self._waiting: deque[Image] = deque()  # by turn, and in one round by arrival
        self._lock = threading.Lock()
        self._sleeping: list[threading.Lock] = []  # one for each slot that waits; released to wake it
        self._reserve: threading.Lock | None = None  # that of the slot for small requests
        self._closed = False

    @property
    def waiting(self) -> int:
        """Images that wait for a slot."""
        return len(self._waiting)

    @property
    def sleeping(self) -> int:
        """Slots that wait for images."""
        return len(self._sleeping)

    @property
    def reserve_sleeps(self) -> bool:
        """Whether the slot for small requests waits, and will do so until images are put."""
        return self._reserve in self._sleeping

    def mixed(self, now: float) -> bool:
        """Whether small requests come among large ones."""
        return self._shares is not None and self._shares.mixed(now)

    @property
    def others_sleep(self) -> bool:
        """Whether all slots but the calling one wait for images."""
        return len(self._sleeping) >= self._slots - 1

    def expect(self, job: Job) -> None:
        """Note that a request has come, whose images may be put."""
        if self._shares is not None:
            self._shares.arrive(job.small, job.admitted)

    def put(self, images: Sequence[Image]) -> None:
        """Add images of one request, and wake a slot for each."""
        with self._lock:
            for image in images:
                insort(self._waiting, image, key=_turn)
            large = self._slots > 1 and not all(map(_is_small, images)) and self.mixed(time.monotonic())
            self._wake(len(images), spared=self._reserve if large else None)

    def take(self, *, reserve: bool = False) -> list[Image]:
        """The next batch if there is one already, else an empty one; `reserve`: of the slot for small."""
        if not self._waiting:
            return []
        with self._lock:
            return self._next_batch(reserve)[0]

    def join(self, size: int) -> list[Image]:
        """Images that may still join a batch of `size`, for which no slot has been woken."""
        with self._lock:
            if not self._waiting or self._sleeping:
                return []
            now = time.monotonic()
            room = self._batch_size(now) - size
            only = _is_small if self.mixed(now) else None
            return self._collate(now, room, 0.0, only)[0] if room > 0 else []

    def wait(self, *, reserve: bool = False) -> list[Image]:
        """Wait for the next batch; it is empty once the backlog is closed. For `reserve` see `take`."""
        while True:
            with self._lock:
                batch, ask_again_at = self._next_batch(reserve)
                if batch or self._closed:
                    return batch
                asleep = threading.Lock()
                asleep.acquire()
                self._sleeping.append(asleep)
                if reserve:
                    self._reserve = asleep
            seconds = -1 if ask_again_at == math.inf else max(0.0, ask_again_at - time.monotonic())
            if not asleep.acquire(timeout=seconds):
                with self._lock:
                    if asleep in self._sleeping:  # else it was woken at this very moment
                        self._sleeping.remove(asleep)

    def close(self) -> None:
        """End the waiting of all slots."""
        with self._lock:
            self._closed = True
            self._wake(len(self._sleeping))

    def _next_batch(self, reserve: bool) -> tuple[list[Image], float]:
        now = time.monotonic()
        # A small request that comes first does not wait for images of a large one to be decoded.
        first_is_small = bool(self._waiting) and self._waiting[0].job.small
        apart = self.mixed(now) and (first_is_small or (reserve and self._slots > 1))
        only = _is_small if apart else None
        batch, ask_again_at = self._collate(now, self._batch_size(now), self._delay, only)
        if batch and self._shares is not None:
            self._shares.begin(self.under_way)
        return batch, ask_again_at

    def _collate(
        self, now: float, room: int, delay: float, only: Callable[[Image], bool] | None = None
    ) -> tuple[list[Image], float]:
        batch, ask_again_at = collate(self._waiting, now, room, delay, only)
        if batch:
            # An image that had its turn early, for want of others, takes nobody else's.
            self.round = max(self.round, max(image.turn - image.job.behind for image in batch))
        return batch, ask_again_at

    def _batch_size(self, now: float) -> int:
        return self._most if self._shares is None else self._shares.size(self.under_way, now)

    def _wake(self, slots: int, spared: threading.Lock | None = None) -> None:
        """Wake slots, first those that fell asleep last: their core's cache is warm."""
        for asleep in [asleep for asleep in reversed(self._sleeping) if asleep is not spared][:slots]:
            self._sleeping.remove(asleep)
            asleep.release()
