"""Two that are loaded in turns, so that a machine whose speed drifts is the same for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from benchmarks.load import Round

ROUNDS: Final = 4

Turn = Callable[[float], Round]


def round_lengths(seconds: float) -> list[int]:
    """`seconds` as rounds of equal length, in whole seconds: `wrk` takes no others."""
    length = max(1, round(seconds / ROUNDS))
    return [length] * max(1, min(ROUNDS, round(seconds / length)))


def take_turns(
    first: Turn, second: Turn, seconds: float, warm_up: float = 1
) -> tuple[list[Round], list[Round]]:
    """Load both for so many seconds each: first, second; second, first; and so on.

    Args:
        first: loads one for as long as it is told to.
        second: loads the other.
        seconds: for each, in all its rounds together.
        warm_up: seconds of load on each before, which are not measured.
    """
    for turn in (first, second):
        turn(warm_up)
    rounds: tuple[list[Round], list[Round]] = ([], [])
    pair = [(first, rounds[0]), (second, rounds[1])]
    for length in round_lengths(seconds):
        for turn, done in pair:
            done.append(turn(length))
        pair.reverse()
    return rounds
