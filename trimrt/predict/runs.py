"""Scores the missing parts of an output: all on this machine, or one part on any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice

import pyarrow as pa

from runtime.manifest import Manifest
from trimrt.predict.parts import Plan, to_table
from trimrt.predict.scoring import Rows, Scorer
from trimrt.predict.sources import Item, Source


def score_parts(
    scorer: Scorer,
    manifest: Manifest,
    source: Source,
    plan: Plan,
    parts: Sequence[int],
    advance: Callable[[int], None] = lambda _images: None,
) -> Iterator[tuple[int, pa.Table]]:
    """Score `parts`, in their order, without a pause between one and the next.

    Args:
        scorer: of the engine.
        manifest: of the engine.
        source: the images.
        plan: says which images are a part.
        parts: to score.
        advance: told how many images more are scored.

    Returns:
        Each part with its rows.

    Raises:
        EngineError: the engine failed.
    """
    scored = scorer.score(_batches(source, plan, parts))
    for part in parts:
        yield part, to_table(_take(scored, len(plan.span(part)), advance), manifest)


def _take(scored: Iterator[Rows], images: int, advance: Callable[[int], None]) -> Iterator[Rows]:
    while images > 0:
        rows = next(scored)
        images -= len(rows.paths)
        advance(len(rows.paths))
        yield rows


def _batches(source: Source, plan: Plan, parts: Sequence[int]) -> Iterator[list[Item]]:
    """The images of `parts` in batches. None crosses parts: a part's results do not depend on the run."""
    for _, following in groupby(enumerate(parts), lambda numbered: numbered[1] - numbered[0]):
        stretch = [part for _, part in following]  # parts that follow each other are read in one go
        items = source.items(plan.span(stretch[0]).start, plan.span(stretch[-1]).stop)
        for part in stretch:
            left = len(plan.span(part))
            while left > 0:
                batch = list(islice(items, min(plan.batch_size, left)))
                left -= len(batch)
                yield batch
