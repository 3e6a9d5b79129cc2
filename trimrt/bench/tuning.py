"""How an engine uses this machine best: found by trying, and kept beside it in `tuning.json`.

A trial does what the server does: where decoding and inference share the cores, it decodes photographs too.
The smallest batch that comes near the best throughput is chosen, because every further image makes the others
wait longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import simplejpeg

from models.cores import cores
from models.files import replace_file
from runtime.manifest import read_manifest
from runtime.timing import rate
from runtime.tuning import TUNING_NAME, Setting, Trial, Tuning, most_slots, this_processor
from trimrt.bench.loop import open_loop

BATCHES: Final = (1, 2, 4, 8, 16, 32)

TRIAL_SECONDS = 0.7

_FIRST_BATCH: Final = 4  # to choose slots and threads with
_NEAR: Final = 0.97
_ROUNDS: Final = 2  # of every trial, so that a brief disturbance does not disqualify a setting


def throughput(package: Path, setting: Setting, files: Sequence[bytes], seconds: float) -> float:
    """Images a second, after `seconds` of work.

    Raises:
        EngineError: the engine does not load, or failed.
    """
    with open_loop(package, setting, files, always_decode=False) as loop:
        return rate(setting.batch, loop.run(seconds))


def best_rates(
    package: Path,
    settings: Sequence[Setting],
    files: Sequence[bytes],
    seconds: float,
    rounds: int,
    progress: Callable[[float], None] = lambda _share: None,
) -> dict[Setting, float]:
    """Best images/s of each setting, over `rounds` interleaved rounds.

    Neighbours slow the machine for seconds at a time, and never make it faster.

    Raises:
        EngineError: see `throughput`.
    """
    rates = dict.fromkeys(settings, 0.0)
    for turn in range(rounds):
        for place, setting in enumerate(settings, start=1):
            rates[setting] = max(rates[setting], throughput(package, setting, files, seconds))
            progress((turn + place / len(settings)) / rounds)
    return rates


def tune(
    package: Path,
    files: Sequence[bytes],
    *,
    seconds: float | None = None,
    progress: Callable[[float], None] = lambda _share: None,
) -> Tuning:
    """Try settings, and write the best one to `package`.

    Args:
        package: the engine's folder.
        files: encoded images like those that will be served.
        seconds: of a trial, of which every setting gets two; None: `TRIAL_SECONDS`.
        progress: told which share of the trials is done.

    Raises:
        EngineError: the engine does not load, or failed.
    """
    seconds = TRIAL_SECONDS if seconds is None else seconds
    manifest = read_manifest(package)
    batches = [size for size in BATCHES if manifest.batch.min <= size <= manifest.batch.max]
    batches = batches or [manifest.batch.max]
    first = min(batches, key=lambda size: abs(size - _FIRST_BATCH))
    ways = list(_ways(first))
    expected = len(ways) + len(batches)
    trials: dict[Setting, Trial] = {}

    def best(settings: Sequence[Setting]) -> Setting:
        fresh = [setting for setting in settings if setting not in trials]
        before = len(trials)

        def report(share: float) -> None:
            progress(min(1.0, (before + share * len(fresh)) / expected))

        for setting, most in best_rates(package, fresh, files, seconds, _ROUNDS, report).items():
            trials[setting] = Trial(setting=setting, throughput=most)
        return max(settings, key=lambda setting: trials[setting].throughput)

    way = best(ways)
    sizes = [way.model_copy(update={"batch": size}) for size in batches]
    fastest = trials[best(sizes)].throughput
    chosen = next(setting for setting in sizes if trials[setting].throughput >= _NEAR * fastest)
    if not chosen.pinning:
        pinned = chosen.model_copy(update={"pinning": True})
        if trials[best([chosen, pinned])].throughput * _NEAR > trials[chosen].throughput:
            chosen = pinned
    progress(1.0)
    tuning = Tuning(processor=this_processor(), cores=cores(), setting=chosen, trials=list(trials.values()))
    with replace_file(package / TUNING_NAME) as path:
        path.write_text(tuning.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return tuning


def _ways(batch: int) -> Iterator[Setting]:
    """Slots and threads: one slot with all cores, one for each core, and between."""
    everything = cores()
    for slots in dict.fromkeys((1, max(1, everything // 2), everything, most_slots())):
        yield Setting(slots=slots, threads=everything, batch=batch)


def sample_photographs() -> list[bytes]:
    """Two JPEGs of 640x427 pixels that are about as hard to decode as photographs."""
    files = []
    for seed in range(2):
        random = np.random.default_rng(seed)
        octaves = []
        for octave in range(2, 9):  # a fractal: as in a photograph, the spectrum falls with the frequency
            noise = random.normal(size=(2**octave, 2**octave, 3)) / 2 ** (octave / 2)
            octaves.append(cv2.resize(noise, (640, 427), interpolation=cv2.INTER_CUBIC))
        image = np.sum(octaves, axis=0)
        low, high = image.min(), image.max()
        pixels = (255 * (image - low) / (high - low)).astype(np.uint8)
        files.append(simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB"))
    return files
