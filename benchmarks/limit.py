"""The limit: the same decoding, preprocessing and inference in one process, with no server.

Run as a program it prints one line of JSON: `python -m benchmarks.limit PACKAGE NAME SECONDS FILE...`.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from models.preprocessing import load_pixels
from server.engines import load_engine
from server.engines.base import Engine, Options

_TRIAL_SECONDS = 1.0


class Limit(BaseModel):
    """What this machine can do with one kind of photograph when nothing is served."""

    photograph: str
    throughput: float = Field(description="images a second, with the best setting")
    setting: str
    cpu_ms: float = Field(description="processor time for one image, with that setting")
    latency_ms: float = Field(description="median of one image after the other, with all threads")


@dataclass(frozen=True)
class Setting:
    """How the loop uses the machine.

    Attributes:
        slots: Python threads, each of which decodes a batch and then runs it.
        threads: threads that OpenVINO computes with, for all slots together.
        batch: images in one inference.
    """

    slots: int
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.slots} x batch {self.batch}, {self.threads} OpenVINO threads"


def throughput(
    package: Path, files: Sequence[bytes], setting: Setting, seconds: float
) -> tuple[float, float]:
    """Images a second, and processor milliseconds for an image."""
    options = Options(slots=setting.slots, threads=setting.threads)
    with closing(load_engine(package, options)) as engine, ThreadPoolExecutor(setting.slots) as pool:
        _work(engine, files, setting.batch, time.perf_counter())  # compiles what this batch size needs
        start, cpu = time.perf_counter(), time.process_time()
        end = start + seconds
        runs = [pool.submit(_work, engine, files, setting.batch, end) for _ in range(setting.slots)]
        images = sum(run.result() for run in runs)
        return images / (time.perf_counter() - start), 1000 * (time.process_time() - cpu) / images


def _work(engine: Engine, files: Sequence[bytes], batch: int, end: float) -> int:
    """Decode and infer batches until `end`; the number of images."""
    spec = engine.manifest.preprocessing
    endless = itertools.cycle(files)
    images = 0
    with closing(engine.open_slot()) as slot:
        while not images or time.perf_counter() < end:
            for row in range(batch):
                slot.pixels[row] = load_pixels(next(endless), spec)
            slot.infer(batch)
            images += batch
    return images


def latency(package: Path, files: Sequence[bytes], threads: int, seconds: float) -> float:
    """Median milliseconds to decode and infer one image, with so many threads on the one inference."""
    with closing(load_engine(package, Options(slots=1, threads=threads))) as engine:
        spec = engine.manifest.preprocessing
        times = []
        end = time.perf_counter() + seconds
        with closing(engine.open_slot()) as slot:
            for file in itertools.cycle(files):
                start = time.perf_counter()
                slot.pixels[0] = load_pixels(file, spec)
                slot.infer(1)
                times.append(time.perf_counter() - start)
                if start > end:
                    break
    return 1000 * float(np.median(times))


def best_setting(package: Path, files: Sequence[bytes], cores: int) -> Setting:
    """The setting that gives most images a second, each tried for a moment."""
    ways = dict.fromkeys(((1, cores), (cores, cores), (cores, 1), (cores + 1, cores)))
    settings = [Setting(slots, threads, batch) for slots, threads in ways for batch in (1, 2, 4, 8, 16)]
    return max(settings, key=lambda setting: throughput(package, files, setting, _TRIAL_SECONDS)[0])


def main(package: str, photograph: str, seconds: str, *names: str) -> None:
    """Measure and print."""
    folder, cores = Path(package), os.cpu_count() or 1
    files = [Path(name).read_bytes() for name in names]
    setting = best_setting(folder, files, cores)
    images, cpu = throughput(folder, files, setting, float(seconds))
    alone = latency(folder, files, cores, float(seconds) / 2)
    measured = Limit(
        photograph=photograph, throughput=images, setting=str(setting), cpu_ms=cpu, latency_ms=alone
    )
    print(measured.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
