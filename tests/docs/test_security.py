"""SECURITY.md: its limits are the server's, and its minimum versions are the package's."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LIMIT = re.compile(r"max_\w+|\w+_limit|timeout_ms|keep_alive_s|grace_s")
NO_LIMIT = {"max_batch_delay_ms", "max_failed_batches"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def in_words(name: str, value: float | None) -> str:
    if value is None:
        return "none"
    if name.endswith("_bytes"):
        return f"{int(value) >> 20} MiB"
    if name.endswith("_ms"):
        return f"{value / 1000:g} s"
    return f"{value:g} s" if name.endswith("_s") else f"{value:,}"


def test_every_limit_is_in_the_table_with_its_default() -> None:
    limits = {
        f"`--{name.replace('_', '-')}`": in_words(name, field.default)
        for name, field in Settings.model_fields.items()
        if LIMIT.fullmatch(name) and name not in NO_LIMIT
    }
    assert {option: default for option, default, _ in rows("Limits")} == limits


@pytest.mark.parametrize(("package", "least"), [row[:2] for row in rows("Dependencies")])
def test_no_version_with_a_known_hole_is_admitted(package: str, least: str) -> None:
    stated = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    ours = [requirement for requirement in map(Requirement, stated) if requirement.name == package]
    assert ours
    for requirement in ours:
        floors = [
            Version(clause.version) for clause in requirement.specifier if clause.operator in (">=", "~=")
        ]
        assert floors, f"{requirement} has no minimum"
        assert max(floors) >= Version(least)


@pytest.mark.parametrize(
    "file", ["constraints.txt", "deploy/jetson/jetpack6.txt", "deploy/jetson/jetpack7.txt"]
)
def test_the_pins_are_versions_that_are_admitted(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = {pin.name.lower(): pin for pin in map(Requirement, filter(re.compile(r"\w").match, lines))}
    held = [package for package, *_ in rows("Dependencies") if package in pins]
    assert "pillow" in held
    least = {package: version for package, version, _ in rows("Dependencies")}
    for package in held:
        (clause,) = pins[package].specifier
        assert Version(clause.version) >= Version(least[package])
