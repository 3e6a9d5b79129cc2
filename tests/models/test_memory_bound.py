"""How much memory a run takes: photographs are trained on by machines with 4 GB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from PIL import Image

PHOTOGRAPHS = 600
BOUND = 2.5e9  # bytes, with what Python and torch take by themselves

# The largest memory of a process counts what its parent had when it was started, and these tests have
# gigabytes. So the command is started by a process that has next to nothing.
_MEASURED: Final = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(process.returncode, usage.ru_maxrss * 1024)
"""


def run_measured(*command: str) -> tuple[int, int]:
    """Exit status and largest resident memory, in bytes, of a command."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    status, memory = done.stdout.split()
    return int(status), int(memory)


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


def test_memory_is_that_of_the_command_and_not_of_these_tests() -> None:
    allocated = bytearray(300_000_000)
    status, memory = run_measured(sys.executable, "-c", "held = bytearray(100_000_000)")
    assert status == 0
    assert 100_000_000 < memory < len(allocated)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_600_photographs_take_less_than_2_5_gb(photographs: Path, tmp_path: Path) -> None:
    """One pass for each network: more take longer, and not more memory."""
    passes = [f"--{part}-epochs=1" for part in ("teacher", "student", "pruning")]
    command = [sys.executable, "-m", "trimrt", "compress", str(photographs), "--out", str(tmp_path), *passes]
    status, memory = run_measured(*command, "--distillation-views", "1")
    assert status == 0
    assert (tmp_path / "pruned").is_dir()
    assert memory < BOUND
