"""Threads that turn encoded images into pixels, beside inference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from PIL import Image


class DecodePool:
    """A fixed number of threads taking work in order.

    Unlike `concurrent.futures` it makes no future per task: a task says itself where its result goes,
    which saves a lock and a wake-up for every image.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"trimrt-decode-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self.submit(Image.init)  # Pillow imports its readers on first use, which would delay a request

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
