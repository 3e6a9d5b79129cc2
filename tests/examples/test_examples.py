"""The scripts of examples/, run as their docstrings say."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Running, running

from models.datasets import DataSplit
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SEVEN = ROOT / "docs/images/7.png"


pytestmark = pytest.mark.slow

Completed = subprocess.CompletedProcess[str]


def run(script: str, *arguments: object, folder: Path = ROOT, code: int = 0) -> Completed:
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert child.returncode == code, child.stderr
    return child


@pytest.fixture(scope="module")
def built(data: DataSplit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The engine package that the first example builds, and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    printed = run("build_and_ask.py", SEVEN, folder=folder).stdout
    return folder / "engines/digits-resnet18-int8-openvino", printed


@pytest.fixture(scope="module")
def server(built: tuple[Path, str]) -> Iterator[Running]:
    with running(Settings(engine=str(built[0]), port=0)) as served:
        yield served


def test_every_script_is_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{script.name}"' in tests for script in EXAMPLES.glob("*.py"))


def test_build_and_ask(built: tuple[Path, str]) -> None:
    assert built[1].startswith("engines/digits-resnet18-int8-openvino says 7, ")


def test_label_folder(built: tuple[Path, str], data: DataSplit, tmp_path: Path) -> None:
    for number, image in enumerate(data.validation.paths[:40]):
        (tmp_path / f"{number:02}.png").write_bytes(image.read_bytes())
    (tmp_path / "notes.txt").write_text("no image")

    child = run("label_folder.py", built[0], tmp_path)

    rows = list(csv.DictReader(io.StringIO(child.stdout)))
    truth = [data.validation.labels[target] for target in data.validation.targets[:40]]
    assert [Path(row["file"]).name for row in rows] == [f"{number:02}.png" for number in range(40)]
    assert sum(row["label"] == label for row, label in zip(rows, truth, strict=True)) >= 38
    assert "notes.txt" in child.stderr


def test_post_image(server: Running) -> None:
    lines = run("post_image.py", server.url, SEVEN).stdout.splitlines()
    assert len(lines) == 6  # five labels, and the times
    assert "inference" in lines[-1]


def test_post_image_tells_why_it_was_refused(server: Running) -> None:
    child = run("post_image.py", server.url, EXAMPLES / "post_image.py", code=1)
    assert "urn:trimrt:problem:" in child.stderr


def test_ask_v2(server: Running, built: tuple[Path, str]) -> None:
    by_v2 = run("ask_v2.py", server.url, built[0].name, SEVEN).stdout.splitlines()
    by_predict = run("post_image.py", server.url, SEVEN).stdout.splitlines()
    assert [line.split()[:2] for line in by_v2] == [line.split() for line in by_predict[:3]]
