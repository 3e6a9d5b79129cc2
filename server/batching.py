"""Which of the waiting images form the next batch. Pure, so that it can be tested without threads."""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol, TypeVar


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
) -> tuple[list[ImageT], list[ImageT], float]:
    """Take the next batch off the queue.

    Work-conserving with the default `delay` of 0: whatever waits, up to `max_size`, runs at once.
    With a delay, fewer than `max_size` images are held back until the oldest has waited that long.

    Args:
        waiting: the queue, oldest first; images that run or died are removed from it.
        now: the monotonic clock, seconds.
        max_size: the most images the engine takes at once.
        delay: how long the oldest image may be held back for company, seconds.

    Returns:
        The images to run now, oldest first (none when there is nothing to run yet); the images taken off the
        queue because nobody waits for them; and when to ask again if nothing else happens, on the monotonic
        clock (infinity: when an image arrives).
    """
    batch: list[ImageT] = []
    dropped: list[ImageT] = []
    while waiting and len(batch) < max_size:
        image = waiting.popleft()
        (dropped if image.is_dead(now) else batch).append(image)
    if batch and len(batch) < max_size and now < (wake_at := batch[0].ready_at + delay):
        waiting.extendleft(reversed(batch))
        return [], dropped, wake_at
    return batch, dropped, math.inf
