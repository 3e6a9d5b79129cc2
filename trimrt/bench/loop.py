"""Decoding and inference in a loop, without a server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from models.preprocessing import load_pixels
from runtime.engine import Engine, Options, Slot
from runtime.loading import load_engine
from runtime.threads import EngineThread
from runtime.tuning import Setting


class Loop:
    """Slots that stay open, each on a thread of its own that fills a batch and runs it, again and again.

    Args:
        engine: to infer with.
        setting: how many slots, and images in a batch.
        files: encoded images, taken in turns.
        decode: fill each batch anew; else the first one's images stay.
    """

    def __init__(self, engine: Engine, setting: Setting, files: Sequence[bytes], *, decode: bool) -> None:
        self._spec = engine.manifest.preprocessing
        self.batch = setting.batch
        self._files = files
        self._decode = decode
        self._threads = [EngineThread() for _ in range(setting.slots)]
        self._slots = [thread.submit(engine.open_slot).result() for thread in self._threads]

    def run(self, seconds: float) -> list[list[float]]:
        """Work for so many seconds, and until the batches begun are done.

        Returns:
            Seconds that each batch took, by slot.
        """
        start = time.perf_counter()
        runs = [
            thread.submit(partial(self._work, slot, start, seconds))
            for thread, slot in zip(self._threads, self._slots, strict=True)
        ]
        return [run.result() for run in runs]

    def rate(self, times: Sequence[Sequence[float]]) -> float:
        """Images a second. A slot that is done early waits for nobody: each counts until its last batch."""
        return sum(self.batch * len(own) / sum(own) for own in times)

    def close(self) -> None:
        """Free slots and threads."""
        for thread, slot in zip(self._threads, self._slots, strict=True):
            thread.submit(slot.close).result()
            thread.close()

    def _work(self, slot: Slot, start: float, seconds: float) -> list[float]:
        endless = itertools.cycle(self._files)
        times: list[float] = []
        now = start
        while not times or now < start + seconds:
            if self._decode or not times:
                for row in range(self.batch):
                    load_pixels(next(endless), self._spec, out=slot.pixels[row])
            slot.infer(self.batch)
            before, now = now, time.perf_counter()
            times.append(now - before)
        return times


@contextmanager
def open_loop(
    package: Path, setting: Setting, files: Sequence[bytes], *, always_decode: bool = True
) -> Iterator[Loop]:
    """The loop with that setting; unless told to, it does not decode for engines that leave the cores alone.

    Raises:
        EngineError: the engine does not load.
    """
    options = Options(
        slots=setting.slots, threads=setting.threads, batch=setting.batch, pinning=setting.pinning
    )
    with (
        closing(load_engine(package, options)) as engine,
        closing(Loop(engine, setting, files, decode=always_decode or engine.on_cpu)) as loop,
    ):
        yield loop
