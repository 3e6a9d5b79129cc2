"""The limit: the same decoding, preprocessing and inference in one process, with no server.

`python -m benchmarks.limit PACKAGE FILE...` finds the best settings, prints them as a line of JSON, and
then works whenever it is told to: it reads lines such as `throughput 2` or `latency 0.5` (seconds), and
answers each with a `Round` as a line of JSON.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import cv2
from pydantic import BaseModel, Field

from benchmarks.load import Round, merge
from benchmarks.turns import take_turns
from models.preprocessing import load_pixels
from runtime.engine import Engine, Options, Slot, cores
from runtime.loading import load_engine
from runtime.manifest import read_manifest
from runtime.threads import EngineThread
from runtime.tuning import Setting
from trimrt.bench.tuning import best_rates

_TRIAL_SECONDS: Final = 0.5
_LATENCY_SECONDS: Final = 2.0
_ROUNDS: Final = 3


class Settings(BaseModel):
    """What the loop found to be best."""

    throughput: Setting = Field(description="gives most images a second")
    latency: Setting = Field(description="is done soonest with one image after the other")


class Loop:
    """Slots that stay loaded, each on a thread of its own that fills a batch and runs it, again and again."""

    def __init__(self, engine: Engine, setting: Setting, files: Sequence[bytes]) -> None:
        self._spec = engine.manifest.preprocessing
        self._batch = setting.batch
        self._files = files
        self._threads = [EngineThread() for _ in range(setting.slots)]
        self._slots = [thread.submit(engine.open_slot).result() for thread in self._threads]

    def run(self, seconds: float) -> Round:
        """Work for so many seconds, and until the batches begun are done."""
        start, cpu = time.perf_counter(), time.process_time()
        runs = [
            thread.submit(partial(self._work, slot, start, seconds))
            for thread, slot in zip(self._threads, self._slots, strict=True)
        ]
        times = [run.result() for run in runs]
        cpu = time.process_time() - cpu
        images = self._batch * sum(map(len, times))
        # A slot that is done early waits for nobody: each counts until its own last batch.
        rate = sum(self._batch * len(own) / sum(own) for own in times)
        latencies = Counter(round(1e6 * one) for own in times for one in own)
        return Round(
            requests=images,
            seconds=images / rate,
            latencies=[(value, self._batch * count) for value, count in latencies.items()],
            cpu_seconds=cpu,
        )

    def close(self) -> None:
        """Free slots and threads."""
        for thread, slot in zip(self._threads, self._slots, strict=True):
            thread.submit(slot.close).result()
            thread.close()

    def _work(self, slot: Slot, start: float, seconds: float) -> list[float]:
        """Seconds that each batch took."""
        endless = itertools.cycle(self._files)
        times: list[float] = []
        now = start
        while not times or now < start + seconds:
            for row in range(self._batch):
                load_pixels(next(endless), self._spec, out=slot.pixels[row])
            slot.infer(self._batch)
            before, now = now, time.perf_counter()
            times.append(now - before)
        return times


@contextmanager
def loaded(package: Path, setting: Setting, files: Sequence[bytes]) -> Iterator[Loop]:
    """The loop with that setting.

    Raises:
        EngineError: the engine does not load.
    """
    options = Options(
        slots=setting.slots, threads=setting.threads, batch=setting.batch, pinning=setting.pinning
    )
    with closing(load_engine(package, options)) as engine, closing(Loop(engine, setting, files)) as loop:
        yield loop


def best_for_throughput(package: Path, files: Sequence[bytes]) -> Setting:
    """The setting that gives most images a second in the best of its trials."""
    everything, most = cores(), read_manifest(package).batch.max
    ways = dict.fromkeys(((1, everything), (everything, everything), (everything + 1, everything)))
    settings = [
        Setting(slots=slots, threads=threads, batch=batch)
        for slots, threads in ways
        for batch in (1, 2, 4, 8, 16)
        if batch <= most
    ]
    rates = best_rates(package, settings, files, _TRIAL_SECONDS, _ROUNDS)
    return max(rates, key=rates.__getitem__)


def best_for_latency(package: Path, files: Sequence[bytes]) -> Setting:
    """One slot with all threads, pinned to their cores or not: whichever is faster in turns."""
    free, pinned = (Setting(slots=1, threads=cores(), batch=1, pinning=pinning) for pinning in (False, True))
    with loaded(package, free, files) as one, loaded(package, pinned, files) as other:
        rounds = take_turns(one.run, other.run, _LATENCY_SECONDS)
    return free if merge(rounds[0]).p50 <= merge(rounds[1]).p50 else pinned


def main(package: str, *names: str) -> None:
    """Find the best settings, then do as told until there is nothing more to read."""
    cv2.setNumThreads(1)  # parallelism is across images, as in the server
    folder = Path(package)
    files = [Path(name).read_bytes() for name in names]
    best = Settings(throughput=best_for_throughput(folder, files), latency=best_for_latency(folder, files))
    print(best.model_dump_json(), flush=True)
    with loaded(folder, best.throughput, files) as busy, loaded(folder, best.latency, files) as alone:
        loops = {"throughput": busy, "latency": alone}
        for line in sys.stdin:
            what, seconds = line.split()
            print(loops[what].run(float(seconds)).model_dump_json(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
