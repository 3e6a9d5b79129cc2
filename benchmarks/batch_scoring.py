"""What scoring in batches takes beside decoding and inference alone: `python -m benchmarks.batch_scoring`.

Photographs by an INT8 ResNet18, and digits by a network of a tenth of a millisecond. The scorer of
`trimrt predict` reads files, decodes, infers, ranks and makes tables; it takes turns with a loop that decodes
and infers, set up as is best for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import click
import cv2
from pydantic import BaseModel, Field
from rich.console import Console

from benchmarks.command import output_option, steps
from benchmarks.contenders import BUILD
from benchmarks.engine import INT8, prepare, prepare_digits
from benchmarks.goals import Goal
from benchmarks.limit import best_for_throughput, work
from benchmarks.load import Round
from benchmarks.measurements import DIGIT, SMALL, Machine, Measurement, this_machine
from benchmarks.photos import photographs, store
from benchmarks.report import goals_table, markdown_table, write_report
from benchmarks.turns import take_turns
from models.cores import cores
from models.datasets import open_dataset
from runtime.manifest import Manifest, read_manifest
from runtime.tuning import Setting
from trimrt.bench.loop import open_loop
from trimrt.options import HELP
from trimrt.predict.parts import Plan
from trimrt.predict.runs import score_parts
from trimrt.predict.scoring import Scorer, Workload, open_scorer
from trimrt.predict.sources import ImageFiles

_TOP_K: Final = 5
_PART: Final = 1024  # as of `trimrt predict`
_LEAST_BATCHES: Final = 8
_SHARE: Final = 0.9  # of the loop's images a second


class Scored(BaseModel):
    """One kind of image."""

    scorer: Measurement
    loop: Measurement

    @property
    def share(self) -> float:
        """The scorer's images a second over the loop's."""
        return self.scorer.load.throughput / self.loop.load.throughput


class Results(BaseModel):
    """One run of the benchmark."""

    machine: Machine
    seconds: float = Field(description="of each, in all its rounds")
    kinds: list[Scored] = []


@dataclass
class Scoring:
    """A scorer at work on the same files over and over.

    Attributes:
        rate: images a second of the round before.
    """

    scorer: Scorer
    manifest: Manifest
    files: Sequence[Path]
    batch: int
    rate: float = 0

    def turn(self, seconds: float) -> Round:
        """Score about as many images as take so many seconds; the first batch is not counted."""
        batches = max(_LEAST_BATCHES, round(self.rate * seconds / self.batch))
        source = ImageFiles(tuple(self.files[i % len(self.files)] for i in range(batches * self.batch)))
        plan = Plan(
            engine=self.manifest.name,
            engine_version=self.manifest.version,
            engine_sha256="",
            images=len(source),
            images_sha256="",
            top_k=min(_TOP_K, len(self.manifest.labels)),
            batch_size=self.batch,
            part_size=-(-_PART // self.batch) * self.batch,
        )
        done: list[tuple[float, float]] = []

        def note(_images: int) -> None:
            done.append((time.perf_counter(), time.process_time()))

        for _ in score_parts(self.scorer, self.manifest, source, plan, range(plan.parts), note):
            pass
        taken, cpu = (last - first for first, last in zip(done[0], done[-1], strict=True))
        images = (batches - 1) * self.batch
        self.rate = images / taken
        return Round(requests=images, seconds=taken, latencies=[], cpu_seconds=cpu)


def measure(name: str, package: Path, files: Sequence[Path], best: Setting, seconds: float) -> Scored:
    """The scorer, and the loop with its `best` setting, in turns."""
    encoded = [file.read_bytes() for file in files]
    manifest = read_manifest(package)
    batch = manifest.batch.max
    workload = Workload(package, min(_TOP_K, len(manifest.labels)), batch, cores())
    with open_loop(package, best, encoded) as loop, open_scorer(workload) as scorer:
        scoring = Scoring(scorer, manifest, files, batch)
        scoring.turn(0)  # which finds the rate
        rounds = take_turns(scoring.turn, partial(work, loop), seconds)
    scored, alone = (Measurement.of(name, batch, done) for done in rounds)
    return Scored(scorer=scored, loop=alone)


def markdown(results: Results) -> str:
    """The table, and whether the goals are reached."""
    head = ["images", "scored, images/s", "CPU ms an image", "decoding and inference", "CPU ms", "share"]
    rows = [
        [
            kind.scorer.photograph,
            f"{kind.scorer.load.throughput:.0f}",
            f"{kind.scorer.cpu_ms:.3f}",
            f"{kind.loop.load.throughput:.0f}",
            f"{kind.loop.cpu_ms:.3f}",
            f"{kind.share:.2f}",
        ]
        for kind in results.kinds
    ]
    goals = [
        Goal(f"{kind.scorer.photograph}: of decoding and inference alone", _SHARE, None, kind.share)
        for kind in results.kinds
    ]
    lines = [f"{results.machine}; {results.seconds:g} s each.", "", *markdown_table(head, rows, left=1)]
    return "\n".join([*lines, *goals_table(goals)]) + "\n"


@click.command(context_settings=HELP)
@click.option("--seconds", default=8.0, help="Length of each, in rounds.")
@output_option("batch_scoring.json and its table")
def main(seconds: float, output: Path) -> None:
    """Measure scoring in batches beside decoding and inference alone."""
    cv2.setNumThreads(1)
    results = Results(machine=this_machine(), seconds=seconds)
    console = Console()
    small = store(SMALL, photographs(), BUILD / "photographs")
    digits = open_dataset("digits").test.paths
    with steps(console) as progress:
        task = progress.add_task("building the engines", total=2)
        slow = prepare(BUILD / "engine", lambda _step: None) / INT8
        fast = prepare_digits(BUILD / "engine")
        for name, package, files in ((SMALL, slow, small), (DIGIT, fast, digits)):
            progress.update(task, description=name)
            best = best_for_throughput(package, [file.read_bytes() for file in files])
            results.kinds.append(measure(name, package, files, best, seconds))
            progress.advance(task)
    write_report(results, markdown(results), output / "batch_scoring.json", console)


if __name__ == "__main__":
    main()
