"""What the study of budgets found: a row for each network, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Final

from pydantic import BaseModel, Field

from experiments.markdown import spread
from experiments.markdown import table as markdown_table
from experiments.results import Made
from models.promise import Device
from models.recipe import TrainingPrecision

UNPRUNED: Final = "unpruned"
WAYS: Final = {
    "uniform": "the same share of each group's channels",
    "magnitude": "chosen by the weights' squares",
    "taylor": "chosen by what the loss would change",
}
PRESETS: Final = {"aggressive": "preset `aggressive`", "aligned": "preset `aligned`"}


class Course(BaseModel):
    """How all networks are trained."""

    images: int = Field(description="to train on, of a data set")
    epochs: int = Field(description="of the unpruned network")
    fine_tuning: int = Field(description="epochs of a pruned one")
    learning_rate: float = Field(default=2e-3, description="peak of both")
    batch_size: int = 32
    threads: int = 1


class Row(BaseModel):
    """One network, pruned and fine-tuned or unpruned."""

    data: str
    seed: int
    share: float = Field(description="of the unpruned network's latency, that it may take")
    way: str = Field(description="that its widths were found, or a preset; `unpruned`: they were not")
    widths: dict[str, int]
    predicted_ms: float
    parameters: int
    macs: int
    validation_wrong: int
    validation_images: int
    test_wrong: int
    test_images: int


class Results(Made):
    """All networks that are finished."""

    device: Device = Field(description="whose latency was predicted")
    timed_networks: int = Field(description="that the predictions are made of")
    course: Course
    precision: TrainingPrecision
    rows: list[Row]


def table(results: Results) -> str:
    """Markdown: each way's errors beside the uniform network's of the same seed, by data set and budget."""
    rows = []
    for data, found in _by_data(results):
        rows.append([f"`{data}`, unpruned", *_cells([row for row in found if row.way == UNPRUNED])])
        for preset, words in PRESETS.items():
            if ours := [row for row in found if row.way == preset]:
                rows.append([words, *_cells(ours)])
        for share in sorted({row.share for row in found if row.way in WAYS}, reverse=True):
            uniform = {row.seed: row for row in found if (row.share, row.way) == (share, "uniform")}
            for way, words in WAYS.items():
                ours = [row for row in found if (row.share, row.way) == (share, way) and row.seed in uniform]
                if ours:
                    beside = [uniform[row.seed] for row in ours] if way != "uniform" else []
                    rows.append([f"{100 * share:.0f} %: {words}", *_cells(ours, beside)])
    head = ["", "seeds", "predicted ms", "parameters", "wrong, validation", "wrong, test", "fewer", ""]
    return markdown_table(head, rows)


def equal_accuracy(results: Results) -> str:
    """Markdown: the fastest network of each way that is as accurate as the unpruned one, by data set.

    That is: its errors on the test images, averaged over all seeds, are at most a standard error more.
    """
    rows = []
    for data, found in _by_data(results):
        unpruned = [row for row in found if row.way == UNPRUNED]
        wrong, images = fmean(row.test_wrong for row in unpruned), unpruned[0].test_images
        most = wrong + math.sqrt(wrong * (1 - wrong / images))
        rows.append([f"`{data}`, unpruned", *_speed(unpruned), f"{most:.0f}"])
        for way, words in (PRESETS | WAYS).items():
            shares = {row.share for row in found if row.way == way}
            networks = [[row for row in found if (row.way, row.share) == (way, share)] for share in shares]
            accurate = [
                network
                for network in networks
                if len(network) == len(unpruned) and fmean(row.test_wrong for row in network) <= most
            ]
            if accurate:
                rows.append([words, *_speed(min(accurate, key=_milliseconds)), ""])
            elif networks:
                rows.append([words, "none", "", ""])
    return markdown_table(["", "predicted ms", "wrong, test", "allowed"], rows)


def _by_data(results: Results) -> Iterator[tuple[str, list[Row]]]:
    for data in dict.fromkeys(row.data for row in results.rows):
        yield data, [row for row in results.rows if row.data == data]


def _speed(rows: Sequence[Row]) -> list[str]:
    return [f"{_milliseconds(rows):.3f}", _wrong(rows)]


def _milliseconds(rows: Sequence[Row]) -> float:
    return fmean(row.predicted_ms for row in rows)


def _wrong(rows: Sequence[Row]) -> str:
    return f"{spread([row.test_wrong for row in rows], '{:.0f}'.format)} of {rows[0].test_images}"


def _cells(rows: Sequence[Row], beside: Sequence[Row] = ()) -> list[str]:
    differences = [other.test_wrong - row.test_wrong for other, row in zip(beside, rows, strict=False)]
    fewer = sum(differences) / sum(other.test_wrong for other in beside) if beside else 0.0
    return [
        str(len(rows)),
        f"{_milliseconds(rows):.3f}",
        f"{fmean(row.parameters for row in rows) / 1e6:.2f} M",
        spread([row.validation_wrong for row in rows], "{:.0f}".format),
        _wrong(rows),
        spread(differences, "{:.0f}".format) if beside else "",
        f"{100 * fewer:.1f} %" if beside else "",
    ]
