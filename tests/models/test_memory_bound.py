"""How much memory a run takes: photographs are trained on by machines with 4 GB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOGRAPHS = 600
BOUND = 2.5e9  # bytes, with what Python and torch take by themselves


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 600 photographs of six classes, 320x240 pixels."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(PHOTOGRAPHS):
        directory = folder / f"class {number % 6}"
        directory.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((320, 240)).save(directory / f"{number}.jpg")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_600_photographs_take_less_than_2_5_gb(photographs: Path, tmp_path: Path) -> None:
    """One pass for each network: more take longer, and not more memory."""
    passes = [f"--{part}-epochs=1" for part in ("teacher", "student", "pruning")]
    command = [sys.executable, "-m", "trimrt", "compress", str(photographs), "--out", str(tmp_path), *passes]
    command += ["--distillation-views", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert (tmp_path / "pruned").is_dir()
    assert usage.ru_maxrss * 1024 < BOUND
