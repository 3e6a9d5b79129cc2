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
_YOUNG: Final = 0.35  # waited less than this part of the time that an image takes on average
_PATIENCE: Final = 16  # batches


class Shares:
    """How many images a slot takes, where slots decode what they compute and share the cores.

    Half of what is under way is divided among the slots, and half goes on waiting: clients that send their
    next image after an answer leave a core nothing to go on with otherwise. But two images together take
    less time than one after the other, and four less than two and two. So a slot takes four where the others
    may have four too and something still waits. Where that is not so, it takes the next larger run of the
    engine's if as many are there, and are young: what has waited for long should not run for long too.
    That falls into a rhythm, with two slots and eight clients of 2, 2, 4: a slot takes what is old, and the
    other then all that has come since. For the rhythm to begin, old ones are taken too once in a while.

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
        self._since = 0  # the last batch that was enlarged
        self._loads: deque[int] = deque(maxlen=2 * slots)

    def begin(self, pending: int) -> None:
        """A slot begins a batch while so many images are under way, waiting or running."""
        self._since += 1
        self._loads.append(pending)

    def size(self, pending: int, at_hand: int, age: float) -> int:
        """The most images that a slot may take now. If they are more than its share, it must take them.

        Args:
            pending: images under way, waiting or running.
            at_hand: those that wait or that the slot has taken already.
            age: how long the oldest of these has waited, as a part of what an image takes on average.
        """
        two = min(2, pending // self._slots)
        share = max(math.ceil(pending / 2 / self._slots), two, 1)
        # Just after an answer its client's next image is not there yet: what was under way lately tells more.
        lately = max(pending, *self._loads, 0)
        if lately > self._slots * self._enough:
            share = max(share, self._enough)
        if share >= self._enough:
            return min(self._most, share - share % self._enough)
        larger = min(size for size in self._runs if size > share)
        spare = lately - larger - (self._slots - 1) * share
        if at_hand >= larger and spare > 0 and (age < _YOUNG or self._since > _PATIENCE):
            self._since = 0
            return min(self._most, larger)
        return min(self._most, max((size for size in self._runs if size <= share), default=share))
