"""The limit: the same decoding, preprocessing and inference in one process, with no server.

`python -m benchmarks.limit PACKAGE FILE...` finds the best settings, prints them as a line of JSON, and
then works whenever it is told to: it reads lines such as `throughput 2` or `latency 0.5` (seconds), and
answers each with a `Round` as a line of JSON.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import cv2
from pydantic import BaseModel, Field

from benchmarks.load import Round, merge
from benchmarks.turns import take_turns
from models.cores import cores
from runtime.manifest import read_manifest
from runtime.timing import rate
from runtime.tuning import Setting
from trimrt.bench.loop import Loop, open_loop
from trimrt.bench.tuning import best_rates

_TRIAL_SECONDS: Final = 0.5
_LATENCY_SECONDS: Final = 2.0
_ROUNDS: Final = 3


class Settings(BaseModel):
    """What the loop found to be best."""

    throughput: Setting = Field(description="gives most images a second")
    latency: Setting = Field(description="is done soonest with one image after the other")


def work(loop: Loop, seconds: float) -> Round:
    """Work for so many seconds, and until the batches begun are done."""
    cpu = time.process_time()
    times = loop.run(seconds)
    cpu = time.process_time() - cpu
    images = loop.batch * sum(map(len, times))
    latencies = Counter(round(1e6 * one) for own in times for one in own)
    return Round(
        requests=images,
        seconds=images / rate(loop.batch, times),
        latencies=[(value, loop.batch * count) for value, count in latencies.items()],
        cpu_seconds=cpu,
    )


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
    with open_loop(package, free, files) as one, open_loop(package, pinned, files) as other:
        rounds = take_turns(partial(work, one), partial(work, other), _LATENCY_SECONDS)
    return free if merge(rounds[0]).p50 <= merge(rounds[1]).p50 else pinned


def main(package: str, *names: str) -> None:
    """Find the best settings, then do as told until there is nothing more to read."""
    cv2.setNumThreads(1)  # parallelism is across images, as in the server
    folder = Path(package)
    files = [Path(name).read_bytes() for name in names]
    best = Settings(throughput=best_for_throughput(folder, files), latency=best_for_latency(folder, files))
    print(best.model_dump_json(), flush=True)
    with open_loop(folder, best.throughput, files) as busy, open_loop(folder, best.latency, files) as alone:
        loops = {"throughput": busy, "latency": alone}
        for line in sys.stdin:
            what, seconds = line.split()
            print(work(loops[what], float(seconds)).model_dump_json(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
