"""Files that cannot be written are one line without a traceback, and what was there stays."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from processes import TRIMRT
from small_kit import write_small_kit

from runtime.manifest import read_artefact, read_manifest


def build(kit: Path, output: Path, *, largest_file: str = "unlimited") -> subprocess.CompletedProcess[str]:
    """`trimrt build`; beyond the size of the largest file, KiB, a write fails as on a full disk."""
    arguments = ["build", str(kit), "-p", "fp32", "--target", "openvino", "-o", str(output)]
    command = ["bash", "-c", f'ulimit -f {largest_file}; exec "$0" "$@"', TRIMRT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_disk_that_fills_during_a_build_leaves_the_package_that_was_there(tmp_path: Path) -> None:
    kit, engines = write_small_kit(tmp_path / "kit"), tmp_path / "engines"
    assert build(kit, engines).returncode == 0
    package = engines / "small-fp32-openvino"
    result = build(kit, engines, largest_file="4")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == f"Error: File too large: {package}"
    assert "Traceback" not in result.stderr
    assert [path.name for path in engines.iterdir()] == [package.name]
    assert read_artefact(package, read_manifest(package))


@pytest.mark.parametrize(
    ("output", "reason"),
    [("file/engines", "Not a directory"), ("/proc/engines", "No such file or directory")],
)
def test_an_output_that_cannot_be_made_is_named(output: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = build(write_small_kit(tmp_path / "kit"), tmp_path / output)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == f"Error: {reason}: {tmp_path / output}"
    assert "Traceback" not in result.stderr
