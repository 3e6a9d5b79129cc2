"""Decoding and inference in a loop, without a server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.preprocessing import load_pixels
from runtime.engine import Options, Slot
from runtime.loading import load_engine
from runtime.timing import TimedSlots
from runtime.tuning import Setting


@dataclass(frozen=True)
class Loop:
    """Slots that stay open between runs, and how many images are in a batch."""

    slots: TimedSlots
    batch: int

    def run(self, seconds: float) -> list[list[float]]:
        """Fill batches and run them for so many seconds; see `TimedSlots.run`."""
        return self.slots.run(self.batch, seconds)


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
    endless = itertools.cycle(files)
    with closing(load_engine(package, options)) as engine:
        spec = engine.manifest.preprocessing

        def fill(slot: Slot) -> None:
            for row in range(setting.batch):
                load_pixels(next(endless), spec, out=slot.pixels[row])

        decoding = fill if always_decode or engine.on_cpu else None
        with closing(TimedSlots(engine, setting.slots, decoding)) as slots:
            yield Loop(slots, setting.batch)
