"""`trimrt inspect`: a package's manifest, for people and for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_engine import write_package

from runtime.manifest import Manifest, read_manifest
from trimrt.cli import main


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path)


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_people_read_what_it_is(package: Path) -> None:
    result = inspect(package)

    assert result.exit_code == 0
    words = " ".join(result.output.split())
    for part in ("tiny, version 1", "precision fp32", "backend openvino", "NHWC", "rebuild with"):
        assert part in words


def test_programs_read_the_manifest(package: Path) -> None:
    result = inspect(package, "--json")

    assert result.exit_code == 0
    assert Manifest.model_validate_json(result.stdout) == read_manifest(package)
    assert json.loads(result.stdout)["name"] == "tiny"


def test_damaged_package_is_still_shown_but_the_exit_code_tells(package: Path) -> None:
    (package / "engine.blob").write_bytes(b"")

    result = inspect(package, "--json")

    assert result.exit_code == 1
    assert json.loads(result.stdout)["name"] == "tiny"
    assert "damaged or changed" in result.stderr


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"format": 99}'])
def test_what_is_no_package_gets_a_message(tmp_path: Path, content: bytes | None) -> None:
    shutil.rmtree(tmp_path / "no", ignore_errors=True)
    (tmp_path / "no").mkdir()
    if content is not None:
        (tmp_path / "no/manifest.json").write_bytes(content)

    result = inspect(tmp_path / "no")

    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
