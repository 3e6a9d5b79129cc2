"""How many images a second each key may have answered."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from server.problems import Problem

_BURST_S: Final = 1.0  # what was not used of so many seconds may be used at once


class RateLimit:
    """A bucket of images for each key, and one for all callers without a key.

    A request is let in while something is in the bucket, and takes all of its images out of it: one of many
    images may leave the bucket in debt, and its key waits the longer afterwards.

    Args:
        per_second: images that flow into each bucket.
        clock: in seconds.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._full_at: dict[bytes | None, float] = {}  # when each bucket is, or was, full again

    def check(self, key: bytes | None) -> None:
        """Make sure that there is something in the bucket of `key`; None: of those who have none.

        Raises:
            Problem: `rate-limited`, with `Retry-After`.
        """
        seconds = self._full_at.get(key, -math.inf) - self._clock() - _BURST_S
        if seconds >= 0:
            wait = max(1, math.ceil(seconds))
            raise Problem(
                "rate-limited",
                f"a key may ask for {self._per_second:g} images a second, all callers without a key together "
                f"for as many; try again in {wait} s",
                headers={"Retry-After": str(wait)},
            )

    def take(self, key: bytes | None, images: int) -> None:
        """Take so many images out of the bucket of `key`.

        Raises:
            Problem: see `check`.
        """
        self.check(key)
        full_at = max(self._full_at.get(key, -math.inf), self._clock())
        self._full_at[key] = full_at + images / self._per_second
