"""Which of the waiting images form the next batch, and how many: pure functions, no threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar


class Waiting(Protocol):
    """What the batcher needs to know of an image."""

    @property
    def ready_at(self) -> float:
        """When it joined the queue, seconds on the monotonic clock."""

    def is_dead(self, now: float) -> bool:
        """Whether nobody waits for it any more: deadline passed, or client gone."""


ImageT = TypeVar("ImageT", bound=Waiting)


def collate(
    waiting: deque[ImageT], now: float, max_size: int, delay: float = 0.0
) -> tuple[list[ImageT], float]:
    """Take the next batch off the queue.

    Work-conserving with the default `delay` of 0: whatever waits, up to `max_size`, runs at once.
    With a delay, fewer than `max_size` images are held back until the oldest has waited that long.

    Args:
        waiting: the queue, oldest first; images of the batch are removed, and so are dead ones before them.
        now: the monotonic clock, seconds.
        max_size: the most images in the batch.
        delay: how long the oldest image may be held back for a fuller batch, seconds.

    Returns:
        The images to run now, oldest first (none when there is nothing to run yet); and when to ask again if
        no image arrives before, on the monotonic clock (infinity: not before one arrives).
    """
    batch: list[ImageT] = []
    while waiting and len(batch) < max_size:
        image = waiting.popleft()
        if not image.is_dead(now):
            batch.append(image)
    if batch and len(batch) < max_size and now < (ask_again_at := batch[0].ready_at + delay):
        waiting.extendleft(reversed(batch))
        return [], ask_again_at
    return batch, math.inf


_ENOUGH: Final = 4  # batch size beyond which time per image stops falling


class Shares:
    """How many images a slot takes, where slots decode their own images and share the cores.

    The images under way are divided among the slots, because a batch takes less time than its images one by
    one. Beyond four images for each slot, half of them wait: larger batches are no more efficient, and a slot
    that is done has its next batch at once, without waiting for clients.

    Args:
        slots: of the engine.
        runs: batch sizes that the engine computes in one run, ascending; it splits others into several.
        most: the most images in a batch.
    """

    def __init__(self, slots: int, runs: Sequence[int], most: int) -> None:
        self._slots = slots
        self._runs = runs
        self._most = most
        self._enough = min(_ENOUGH, runs[-1])
        self._loads: deque[int] = deque(maxlen=2 * slots)

    def begin(self, pending: int) -> None:
        """Note that a slot begins a batch while `pending` images are under way, waiting or running."""
        self._loads.append(pending)

    def size(self, pending: int) -> int:
        """The most images that a slot may take now, while `pending` are under way."""
        # A client that was just answered has not sent its next image yet, so use the recent load.
        share = max(1, max(pending, *self._loads, 0) // self._slots)
        if share > self._enough:
            share = max(share // 2, self._enough)
            return min(self._most, share - share % self._enough)
        return min(self._most, max((size for size in self._runs if size <= share), default=share))
