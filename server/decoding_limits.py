"""What decoding may take of the process: time for each request, memory for all of them."""

from __future__ import annotations

import threading
import time
from typing import Final

from models.preprocessing import Cost, ImageTooLargeError
from server.jobs import Job
from server.problems import Problem
from server.settings import Settings

_GIVE_WAY_S: Final = 4e-3
_SMALL: Final = 1 << 20  # bytes; one such image for each thread is not worth counting


class Precedence:
    """Precedence of the event loop's thread, which enters it, over threads that give way.

    Both need the interpreter's lock most of the time, and small requests wait for the event loop. That never
    waits here: whoever gives way may be a thread of low priority.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False

    def __enter__(self) -> None:
        self._held = self._held or self._lock.acquire(blocking=False)

    def __exit__(self, *_error: object) -> None:
        if self._held:
            self._held = False
            self._lock.release()

    def give_way(self) -> None:
        """Wait until the event loop has done what it does, but not for long: it may have much to do."""
        if self._lock.acquire(timeout=_GIVE_WAY_S):
            self._lock.release()


class DecodingLimits:
    """Admits images to be decoded, judged by what their headers say; safe to use from any thread.

    Args:
        settings: those of decoding.

    Attributes:
        max_pixels: the most in one image.
        formats: those accepted, by the names in `models.preprocessing.FORMATS`.
        held: bytes that the images under decode take, but for small ones.
        precedence: of the event loop over the decoding of large requests.
    """

    def __init__(self, settings: Settings) -> None:
        self.max_pixels = settings.max_pixels
        self.formats = frozenset(name.strip().upper() for name in settings.formats.split(","))
        self.held = 0
        self.precedence = Precedence()
        self._max_seconds = settings.max_decoding_ms / 1000
        self._max_memory = settings.max_decoding_memory_bytes
        self._changed = threading.Condition()

    def admit(self, cost: Cost, job: Job) -> None:
        """Let an image of `job` be decoded, once there is memory for it; `release` gives the memory back.

        Raises:
            ImageTooLargeError: it is more than the limits allow.
            Problem: `deadline-exceeded`; the memory did not become free in time.
        """
        if cost.memory > self._max_memory:
            raise ImageTooLargeError(
                f"decoding the image would take {cost.memory:,} bytes of memory; "
                f"the limit is {self._max_memory:,}; send it smaller, or as a JPEG"
            )
        seconds = job.decoding_seconds + cost.seconds
        if seconds > self._max_seconds:
            raise ImageTooLargeError(self._too_slow(cost, job))
        job.decoding_seconds = seconds  # without a lock: what another thread just counted may be lost
        if cost.memory <= _SMALL:
            return
        with self._changed:
            while self.held + cost.memory > self._max_memory:
                if not self._changed.wait(job.deadline - time.monotonic()):
                    raise Problem("deadline-exceeded", "no memory to decode became free before the deadline")
            self.held += cost.memory

    def release(self, cost: Cost) -> None:
        """Give back the memory of an image that was admitted."""
        if cost.memory <= _SMALL:
            return
        with self._changed:
            self.held -= cost.memory
            self._changed.notify_all()

    def _too_slow(self, cost: Cost, job: Job) -> str:
        limit = f"the limit is {self._max_seconds * 1000:,.0f} ms"
        if cost.seconds > self._max_seconds:
            return (
                f"decoding the image could take {cost.seconds * 1000:,.0f} ms of processor time; {limit}; "
                "send it smaller, or as a JPEG with a single scan"
            )
        return (
            f"decoding the request's images could take more than {job.decoding_seconds * 1000:,.0f} ms of "
            f"processor time; {limit}; send fewer in one request, or smaller ones"
        )
