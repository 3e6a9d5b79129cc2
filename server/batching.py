"""Which of the waiting images form the next batch, and how many of them. Threads are not known here."""

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


_ENOUGH: Final = 4  # images in a run, beyond which one more takes no less


class Shares:
    """How many images a slot takes, where slots decode what they compute and share the cores.

    What is under way is divided among the slots, for images that run together take less time than one after
    the other. Of more than four for each slot, half goes on waiting: larger runs gain no more, and a slot
    that is done has its next batch at once, without waiting for clients.

    Args:
        slots: of the engine.
        runs: sizes of batches that the engine computes in one run, ascending; others take several.
        most: the most images that a slot is given.
    """

    def __init__(self, slots: int, runs: Sequence[int], most: int) -> None:
        self._slots = slots
        self._runs = runs
        self._most = most
        self._enough = min(_ENOUGH, runs[-1])
        self._loads: deque[int] = deque(maxlen=2 * slots)

    def begin(self, pending: int) -> None:
        """A slot begins a batch while so many images are under way, waiting or running."""
        self._loads.append(pending)

    def size(self, pending: int) -> int:
        """The most images that a slot may take now, while so many are under way."""
        # Just after an answer its client's next image is not there yet: what was under way lately tells more.
        share = max(1, max(pending, *self._loads, 0) // self._slots)
        if share > self._enough:
            share = max(share // 2, self._enough)
            return min(self._most, share - share % self._enough)
        return min(self._most, max((size for size in self._runs if size <= share), default=share))
