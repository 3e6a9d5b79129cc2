"""Scoring in batches is held against decoding and inference alone."""

from __future__ import annotations

from pathlib import Path

from tiny_engine import write_package

from benchmarks.batch_scoring import Results, markdown, measure
from benchmarks.measurements import this_machine
from benchmarks.photos import photographs, store
from runtime.tuning import Setting


def test_the_scorer_takes_turns_with_the_loop_and_its_share_is_in_the_report(tmp_path: Path) -> None:
    package = write_package(tmp_path)
    files = store("tiny", photographs(0.01), tmp_path)

    scored = measure("tiny", package, files, Setting(slots=1, threads=1, batch=4), seconds=1)
    text = markdown(Results(machine=this_machine(), seconds=1, kinds=[scored]))

    assert scored.scorer.load.requests > scored.scorer.load.seconds > 0.5
    assert scored.loop.load.requests > 0
    assert scored.share == scored.scorer.load.throughput / scored.loop.load.throughput
    assert f"| tiny: of decoding and inference alone | at least 0.9 | {scored.share:.2f} |" in text
