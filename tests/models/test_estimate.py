"""How long a run takes: told before it begins, and corrected by what really happens."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from models.datasets import DataSplit
from models.estimate import Estimate, Part, RunProgress, in_words
from models.pruning import Pruner
from models.recipe import Pruning, make_recipe
from models.rehearsal import estimate
from models.setup import Setup

PARTS = (
    Part("teacher", "teacher", steps=10, seconds=600, seconds_after=60),
    Part("teacher's views", "its labels", steps=100, seconds=120),
    Part("student", "student", steps=10, seconds=300),
    Part("pruned-1", "pruned", steps=5, seconds=60),
    Part("pruned-2", "pruned", steps=5, seconds=60),
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_all_parts_are_told() -> None:
    assert (
        str(Estimate(PARTS)) == "about 20 min (teacher 11 min, its labels 2 min, student 5 min, pruned 2 min)"
    )


def test_what_is_done_already_takes_no_time() -> None:
    estimate = Estimate(PARTS)
    estimate.begin("student", done=5)
    assert str(estimate) == "about 4 min (student 2 min, pruned 2 min)"


def test_at_the_foretold_pace_it_counts_down() -> None:
    clock = Clock()
    estimate = Estimate(PARTS, clock)
    estimate.begin("teacher", 0)
    assert estimate.seconds_left == pytest.approx(1200)
    clock.now = 300
    estimate.advance(5)
    assert estimate.seconds_left == pytest.approx(900)
    clock.now = 660
    estimate.begin("teacher's views", 0)
    assert estimate.seconds_left == pytest.approx(540)


def test_a_machine_that_is_slower_than_expected_is_believed_after_a_while() -> None:
    clock = Clock()
    estimate = Estimate(PARTS, clock)
    estimate.begin("teacher", 0)
    clock.now = 1200  # for half of the teacher, which should have taken 300
    estimate.advance(5)
    assert estimate.seconds_left == pytest.approx(4 * 900, rel=0.05)


def test_parts_that_are_not_needed_are_left_out() -> None:
    clock = Clock()
    estimate = Estimate(PARTS, clock)
    estimate.begin("student", 0)  # the teacher and its labels were there
    clock.now = 150
    estimate.advance(5)
    assert estimate.seconds_left == pytest.approx(270)


def test_a_part_without_steps_takes_what_follows_it() -> None:
    estimate = Estimate([Part("teacher", "teacher", steps=0, seconds=0, seconds_after=9)])
    assert str(estimate) == "about 9 s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (45, "45 s"), (99, "99 s"), (100, "2 min"), (3000, "50 min"), (7500, "2 h 05 min")],
)
def test_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    """What is printed of twenty steps, ten seconds each."""
    clock, output = Clock(), io.StringIO()
    monkeypatch.setattr("models.estimate.time.monotonic", clock)
    progress = RunProgress(Console(file=output, force_terminal=terminal, width=200))
    progress.estimate = Estimate([Part("teacher", "teacher", steps=20, seconds=200)], clock)
    task = progress.add_task("teacher", total=20, info="")
    for step in range(20):
        clock.now += 10
        progress.update(task, advance=1, info=f"epoch {step + 1}/20")
    return output.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False).splitlines() == [
        "this will take about 3 min",
        "teacher: epoch 6/20  about 2 min left",
        "teacher: epoch 12/20  about 80 s left",
        "teacher: epoch 18/20  about 20 s left",
    ]


def test_on_a_terminal_the_bar_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=True).splitlines() == ["this will take about 3 min"]


def test_each_network_on_the_way_to_a_budget_is_timed_by_itself(split: DataSplit, tmp_path: Path) -> None:
    recipe = make_recipe(overrides={"macs": 1e6, "front": 2, "threads": 1, "pruning": {"steps": 2}})
    setup = Setup(split, recipe, tmp_path, None, None, Console(quiet=True))
    shares = []

    def narrow(network: nn.Module, share: float) -> None:
        shares.append(share)
        if share == 1:
            Pruner(network, setup.spec, Pruning(steps=1), ratio=0.9).step()

    whole = estimate(setup, ["pruned"], narrow)
    assert shares == [0.5, 1]
    all_steps = whole.seconds_left
    whole.begin("pruned-3", done=0)
    assert whole.seconds_left < all_steps / 3
