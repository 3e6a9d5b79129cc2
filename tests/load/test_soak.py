"""The short form of the soak; `make soak` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import faults, report, soak

SECONDS = 10


@pytest.mark.slow
def test_good_clients_get_right_answers_beside_hostile_ones(tmp_path: Path) -> None:
    outcome = soak(tmp_path, SECONDS, limit=False)
    print(report(outcome))
    assert faults(outcome) == []
    assert "Traceback" not in (tmp_path / "log").read_text()
