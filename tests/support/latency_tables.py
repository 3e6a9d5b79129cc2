"""Latency tables of machines that nobody has: networks take what a formula says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from models.latency import Group, LatencyTable

BLOCK = 16


def table_of(
    channels: Mapping[str, int],
    milliseconds: Callable[[Mapping[str, int]], float],
    pairs: list[tuple[str, str]] | None = None,
    **fields: Any,
) -> LatencyTable:
    """A complete table.

    Args:
        channels: of each group.
        milliseconds: that a network takes, by the widths of all groups.
        pairs: of groups that meet in a layer; None: all of them.
        fields: that are to be others.
    """
    names = sorted(channels)
    every_pair = [(one, other) for one in names for other in names if one < other]
    table = LatencyTable(
        **{
            "created_at": datetime.now(timezone.utc),
            "trimrt_version": "0",
            "network": "small",
            "structure": "",
            "macs": None,
            "backend": "openvino",
            "backend_version": "0",
            "precision": "int8",
            "batch": 1,
            "machine": "a processor",
            "cores": 2,
            "block": BLOCK,
            "groups": [Group(name=name, channels=width, layers=(name,)) for name, width in channels.items()],
            "pairs": every_pair if pairs is None else pairs,
            **fields,
        }
    )
    narrowest = {group.name: table.narrowest(group) for group in table.groups}
    for _ in range(2):
        table = table.with_times([(widths, milliseconds(narrowest | widths)) for widths in table.missing()])
    return table
