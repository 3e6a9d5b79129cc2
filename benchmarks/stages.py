"""What each stage of a request costs: `python -m benchmarks.stages`.

The stages are timed one by one on one thread, in turns. What the server itself costs is found with a
network that costs nothing: processor time for a request, less that of the same decoding and inference
in a loop, in turns with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import click
import cv2
import numpy as np
import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.answers import post
from benchmarks.contenders import BUILD, TRIMRT
from benchmarks.engine import INT8, NEXT_TO_NOTHING, SPEC, prepare
from benchmarks.limit import work
from benchmarks.load import cpu_milliseconds
from benchmarks.photos import photographs, store
from benchmarks.processes import exit_on_sigterm
from benchmarks.serving import serving
from benchmarks.turns import take_turns
from builder.compile.measurement import time_in_turns
from models.images.decoding import decode
from models.images.formats import read_header
from models.preprocessing import load_pixels
from runtime.engine import Options, Slot
from runtime.loading import load_engine
from runtime.tuning import Setting
from trimrt.bench.loop import open_loop
from trimrt.options import HELP

_BATCH: Final = 8
_CONNECTIONS: Final = 8


def stage_milliseconds(slot: Slot, answer: bytes, file: bytes, repeats: int) -> dict[str, float]:
    """Median milliseconds of every stage for one image, on this thread.

    Args:
        slot: of the engine to infer with.
        answer: a response of the server, to write again.
        file: a JPEG.
        repeats: how often each stage is timed.
    """
    pixels = load_pixels(file, SPEC)
    content = orjson.loads(answer)

    def decode_only() -> None:
        decode(file, read_header(file), SPEC.resize)

    def assemble() -> None:
        for row in range(_BATCH):
            slot.pixels[row] = pixels

    def infer_one() -> None:
        slot.infer(1)

    def infer_batch() -> None:
        slot.infer(_BATCH)

    stages: dict[str, tuple[Callable[[], object], int]] = {
        "decode": (decode_only, 1),
        "decode, resize and crop": (lambda: load_pixels(file, SPEC), 1),
        "batch assembly": (assemble, _BATCH),
        "inference, batch 1": (infer_one, 1),
        f"inference, batch {_BATCH}": (infer_batch, _BATCH),
        "serialisation": (lambda: orjson.dumps(content), 1),
    }
    with Progress(transient=True) as progress:
        task = progress.add_task("stages", total=1.0)
        times = time_in_turns(
            [run for run, _ in stages.values()],
            rounds=repeats,
            progress=lambda share: progress.update(task, completed=share),
        )
    return {
        name: float(np.median(taken)) / images
        for (name, (_, images)), taken in zip(stages.items(), times, strict=True)
    }


def serve_nothing(engines: Path, files: Sequence[Path], seconds: float) -> tuple[float, float]:
    """Processor milliseconds a request with a network that costs nothing, and of the same without a server.

    Raises:
        click.ClickException: the server does not start.
    """
    # Of two slots one would often be alone, and have the other core spin for it.
    setting = Setting(slots=1, threads=1, batch=_CONNECTIONS // 2)
    settings = {"TRIMRT_SLOTS": "1", "TRIMRT_INFERENCE_THREADS": "1"}
    encoded = [file.read_bytes() for file in files]
    with (
        open_loop(engines / NEXT_TO_NOTHING, setting, encoded) as loop,
        serving(TRIMRT, "trimrt", engines / NEXT_TO_NOTHING, encoded[0], settings) as server,
    ):
        served, alone = take_turns(partial(server.round, files, _CONNECTIONS), partial(work, loop), seconds)
    return cpu_milliseconds(served), cpu_milliseconds(alone)


@click.command(context_settings=HELP)
@click.option("--seconds", default=8.0, help="Length of each load.")
@click.option("--repeats", default=200, help="How often each stage is timed.")
def main(seconds: float, repeats: int) -> None:
    """Time every stage of a request."""
    exit_on_sigterm()
    cv2.setNumThreads(1)
    TRIMRT.install()
    engines = prepare(BUILD / "engine", click.echo)
    files = store("640x427", photographs(), BUILD / "photographs")
    file = files[0].read_bytes()
    with serving(TRIMRT, "trimrt", engines / INT8, file) as server:
        answer = post(TRIMRT, server.port, file)
    engine = load_engine(engines / INT8, Options(slots=1, threads=1))
    with closing(engine), closing(engine.open_slot()) as slot:
        slot.pixels[:] = np.random.default_rng(0).integers(0, 256, slot.pixels.shape, dtype=np.uint8)
        times = stage_milliseconds(slot, answer, file, repeats)
    table = Table("stage", box=SIMPLE_HEAD, title="ms for one image, one thread")
    table.add_column("ms", justify="right")
    whole, alone = serve_nothing(engines, files, seconds)
    times["a request, network that costs nothing"] = whole
    times["the same without a server"] = alone
    times["what the server costs"] = whole - alone
    for name, milliseconds in times.items():
        table.add_row(name, f"{milliseconds:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
