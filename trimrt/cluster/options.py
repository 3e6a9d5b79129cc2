"""What the commands that use a Ray cluster have in common. Imports no Ray."""

from __future__ import annotations

from typing import NamedTuple

import click


class Replicas(NamedTuple):
    """How many replicas a pool has; it scales with its load when they differ."""

    least: int
    most: int


def replicas(text: str) -> Replicas:
    """The type of an option: a number such as `2`, or a range such as `1-4`.

    Raises:
        click.BadParameter: it is neither.
    """
    least, dash, most = text.partition("-")
    if not (least.isdecimal() and (most.isdecimal() if dash else True)):
        raise click.BadParameter(f"{text!r} is neither a number such as 2 nor a range such as 1-4")
    parsed = Replicas(int(least), int(most or least))
    if parsed.most < max(1, parsed.least):
        raise click.BadParameter(f"{text!r}: the larger number comes second and is at least 1")
    return parsed
