"""Which of the waiting images form the next batch, and how many: pure functions, no threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
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
    waiting: deque[ImageT],
    now: float,
    max_size: int,
    delay: float = 0.0,
    only: Callable[[ImageT], bool] | None = None,
) -> tuple[list[ImageT], float]:
    """Take the next batch off the queue.

    Work-conserving with the default `delay` of 0: whatever waits, up to `max_size`, runs at once.
    With a delay, fewer than `max_size` images are held back until one of them has waited that long.

    Args:
        waiting: the queue; images of the batch are removed from its front, and so are dead ones before them.
        now: the monotonic clock, seconds.
        max_size: the most images in the batch.
        delay: how long an image may be held back for a fuller batch, seconds.
        only: whether an image may be taken; None: all may. The others keep their places.

    Returns:
        The images to run now, in the queue's order (none when there is nothing to run yet); and when to ask
        again if no image arrives before, on the monotonic clock (infinity: not before one arrives).
    """
    batch: list[ImageT] = []
    left: list[ImageT] = []
    while waiting and len(batch) < max_size:
        image = waiting.popleft()
        if not image.is_dead(now):
            (batch if only is None or only(image) else left).append(image)
    waiting.extendleft(reversed(left))
    if delay and batch and len(batch) < max_size:
        ask_again_at = min(image.ready_at for image in batch) + delay
        if now < ask_again_at:
            waiting.extendleft(reversed(batch))
            return [], ask_again_at
    return batch, math.inf


SMALL: Final = 4
"""The most images of a small request; and the batch size beyond which time per image hardly falls."""

_MIXED_S: Final = 1.0  # how long a request counts as one that others meet


class Shares:
    """How many images a slot takes, where slots decode their own images and share the cores.

    The images under way are divided among the slots, because a batch takes less time than its images one by
    one. Beyond four images for each slot, half of them wait: larger batches are no more efficient, and a slot
    that is done has its next batch at once, without waiting for clients. But while small requests come among
    large ones, batches stay at four images: a small request waits for one to end and then rides in another.

    Args:
        slots: of the engine.
        runs: batch sizes that the engine computes in one run, ascending; it splits others into several.
        most: the most images in a batch.
    """

    def __init__(self, slots: int, runs: Sequence[int], most: int) -> None:
        self._slots = slots
        self._runs = runs
        self._most = most
        self._enough = min(SMALL, runs[-1])
        self._loads: deque[int] = deque(maxlen=2 * slots)
        self._came_at = [-math.inf, -math.inf]  # the last small request, the last large one

    def arrive(self, small: bool, now: float) -> None:
        """Note that a request has come, a small one or one that makes way for such."""
        self._came_at[not small] = now

    def begin(self, pending: int) -> None:
        """Note that a slot begins a batch while `pending` images are under way, waiting or running."""
        self._loads.append(pending)

    def mixed(self, now: float) -> bool:
        """Whether small requests come among large ones."""
        return now < min(self._came_at) + _MIXED_S

    def size(self, pending: int, now: float) -> int:
        """The most images that a slot may take now, while `pending` are under way."""
        # A client that was just answered has not sent its next image yet, so use the recent load.
        share = max(1, max(pending, *self._loads, 0) // self._slots)
        if share > self._enough:
            share = self._enough if self.mixed(now) else max(share // 2, self._enough)
            return min(self._most, share - share % self._enough)
        return min(self._most, max((size for size in self._runs if size <= share), default=share))
