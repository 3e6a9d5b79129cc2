"""How long building an engine takes is foretold from two small builds, before its network is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_student import SPEC

from builder import rehearsal
from builder.rehearsal import foretell_build
from models.checkpoint import load_checkpoint
from models.datasets import DataSplit


def test_what_grows_with_the_images_is_told_from_what_does_not(
    checkpoint: Path, data: DataSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = load_checkpoint(checkpoint)
    monkeypatch.setattr(rehearsal, "_timed", lambda _network, _spec, _data, share: 12 + 64 * share)
    assert foretell_build(network, SPEC, data) == pytest.approx(12 + 64)


@pytest.mark.slow
def test_small_builds_are_made_of_a_network_that_knows_nothing(checkpoint: Path, data: DataSplit) -> None:
    network, _ = load_checkpoint(checkpoint)
    for parameter in network.parameters():
        parameter.data = parameter.data.roll(1)
    assert foretell_build(network, SPEC, data) > 0
