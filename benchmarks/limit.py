"""The limit: the same decoding, preprocessing and inference in one process, with no server.

Run as a program it prints one line of JSON: `python -m benchmarks.limit PACKAGE NAME SECONDS FILE...`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from models.preprocessing import load_pixels
from server.engines import load_engine
from server.engines.base import Options, cores
from server.engines.tuned import Setting
from server.tuning import throughput

_TRIAL_SECONDS = 1.0


class Limit(BaseModel):
    """What this machine can do with one kind of photograph when nothing is served."""

    photograph: str
    throughput: float = Field(description="images a second, with the best setting")
    setting: str
    cpu_ms: float = Field(description="processor time for one image, with that setting")
    latency_ms: float = Field(description="median of one image after the other, with all threads")


def latency(package: Path, files: Sequence[bytes], threads: int, seconds: float) -> float:
    """Median milliseconds to decode and infer one image, with so many threads on the one inference."""
    with closing(load_engine(package, Options(slots=1, threads=threads))) as engine:
        spec = engine.manifest.preprocessing
        times = []
        end = time.perf_counter() + seconds
        with closing(engine.open_slot()) as slot:
            for file in itertools.cycle(files):
                start = time.perf_counter()
                load_pixels(file, spec, out=slot.pixels[0])
                slot.infer(1)
                times.append(time.perf_counter() - start)
                if start > end:
                    break
    return 1000 * float(np.median(times))


def best_setting(package: Path, files: Sequence[bytes]) -> Setting:
    """The setting that gives most images a second, each tried for a moment."""
    everything = cores()
    ways = dict.fromkeys(((1, everything), (everything, everything), (everything + 1, everything)))
    settings = [
        Setting(slots=slots, threads=threads, batch=batch)
        for slots, threads in ways
        for batch in (1, 2, 4, 8, 16)
    ]
    return max(settings, key=lambda setting: throughput(package, setting, files, _TRIAL_SECONDS)[0])


def main(package: str, photograph: str, seconds: str, *names: str) -> None:
    """Measure and print."""
    folder = Path(package)
    files = [Path(name).read_bytes() for name in names]
    setting = best_setting(folder, files)
    images, cpu = throughput(folder, setting, files, float(seconds))
    alone = latency(folder, files, cores(), float(seconds) / 2)
    measured = Limit(
        photograph=photograph,
        throughput=images,
        setting=f"{setting.slots} x batch {setting.batch}, {setting.threads} OpenVINO threads",
        cpu_ms=cpu,
        latency_ms=alone,
    )
    print(measured.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
