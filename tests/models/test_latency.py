"""The latency table: what it predicts, and which files it is read from."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from latency_tables import BLOCK, table_of

from models.latency import LatencyError, LatencyPredictor, LatencyTable, read_latency_table

CHANNELS = {"stem": 64, "inner": 96, "last": 128, "head": 8}
PAIRS = [("inner", "stem"), ("inner", "last"), ("head", "last")]


def blocks(width: int) -> int:
    """As kernels count channels."""
    return -(-width // BLOCK)


def staircase(widths: Mapping[str, int]) -> float:
    """Milliseconds of a network whose layers take blocks of inputs times blocks of outputs."""
    layers = sum(0.01 * blocks(widths[one]) * blocks(widths[other]) for one, other in PAIRS)
    return 0.1 + 0.02 * blocks(widths["stem"]) ** 1.5 + layers


def make_table(milliseconds: Callable[[Mapping[str, int]], float] = staircase) -> LatencyTable:
    """The table of a machine on which networks take that long."""
    return table_of(CHANNELS, milliseconds, PAIRS)


def test_times_that_depend_on_two_groups_at_most_are_predicted_exactly() -> None:
    predictor, draw = LatencyPredictor(make_table()), random.Random(0)
    for _ in range(100):
        widths = {name: draw.randint(1, channels) for name, channels in CHANNELS.items()}
        assert predictor.predict(widths) == pytest.approx(staircase(widths), rel=1e-4)
    assert predictor.predict(CHANNELS) == pytest.approx(staircase(CHANNELS), rel=1e-4)


def test_groups_that_are_not_named_are_at_their_narrowest() -> None:
    table = make_table()
    predictor = LatencyPredictor(table)
    assert predictor.predict({}) == table.timed[0].ms
    assert table.progress == 1
    assert predictor.predict({"stem": 64}) > predictor.predict({"stem": 32}) > predictor.predict({})


def test_whole_networks_correct_what_the_differences_add_up_to() -> None:
    table = make_table()
    assert len(table.checks()) >= 5
    assert LatencyPredictor(table).errors == pytest.approx([0.0] * len(table.checks()), abs=1e-4)
    least, times = table.timed[0].ms, table.times()
    for _ in range(2):
        table = table.with_times(
            (widths, least * (times[frozenset(widths.items())] / least) ** 0.9) for widths in table.checks()
        )
    predictor = LatencyPredictor(table)
    assert predictor.predict(CHANNELS) == pytest.approx(
        least * (staircase(CHANNELS) / least) ** 0.9, rel=1e-4
    )
    assert predictor.errors == pytest.approx([0.0] * len(table.checks()), abs=1e-4)


def test_the_table_tells_how_far_its_predictions_are_off() -> None:
    table = make_table()
    disturbed = table.checks()[0]
    for _ in range(2):
        table = table.with_times([(disturbed, 0.5 * staircase(CHANNELS))])
    errors = LatencyPredictor(table).errors
    assert errors[0] == pytest.approx(1.0, rel=1e-3)  # the others are as they were
    assert all(-0.5 < error < 0 for error in errors[1:])


def test_a_disturbed_network_is_timed_until_its_least_time_was_reached_twice() -> None:
    table = make_table()
    widths = {"stem": 32}
    table = table.model_copy(update={"timed": [timed for timed in table.timed if timed.widths != widths]})
    for ms, settled in ((2.0, False), (1.0, False), (1.5, False), (1.01, True)):
        table = table.with_times([(widths, ms)])
        assert (widths not in table.missing()) is settled
    assert table.times()[frozenset(widths.items())] == 1.0


def test_a_table_of_another_network_is_refused() -> None:
    with pytest.raises(LatencyError, match=r"no group layer1; it is of another network"):
        LatencyPredictor(make_table()).predict({"layer1": 16})


@pytest.mark.parametrize("place", [0, 3, -1])
def test_an_unfinished_table_predicts_nothing(place: int) -> None:
    table = make_table()
    left_out = table.timed[place]
    table = table.model_copy(update={"timed": [timed for timed in table.timed if timed is not left_out]})
    assert table.missing() == [left_out.widths]
    with pytest.raises(LatencyError, match="unfinished"):
        LatencyPredictor(table)


def test_a_table_is_read_from_its_file(tmp_path: Path) -> None:
    table = make_table()
    (tmp_path / "table.json").write_text(table.model_dump_json(), encoding="utf-8")
    assert read_latency_table(tmp_path / "table.json") == table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read: No such file.*`trimrt measure-layers` writes"),
        (b"{}", r"is not a valid latency table: .*groups"),
        (b"\xff", r"is not a valid latency table"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "table.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LatencyError, match=message):
        read_latency_table(file)
