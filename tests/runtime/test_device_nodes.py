"""Which device files a process may not open: asked by a process that may not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runtime.cuda.nodes import advice, closed_nodes, device_nodes

ROOT = Path(__file__).parents[2]
NODES = {"nvmap": 0o660, "nvhost-gpu": 0o666, "dri/renderD128": 0o660, "dri/card0": 0o660, "null": 0o666}


@pytest.fixture
def root() -> Iterator[Path]:
    """A Jetson's `/dev` as files; in a folder that other users may look into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        for node, mode in NODES.items():
            path = Path(name) / "dev" / node
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.chmod(mode)
        yield Path(name)


def as_a_stranger(root: Path, function: str) -> str:
    """What a function says to a user who owns none of these files."""
    imports = f"import grp, os, pathlib; from runtime.cuda.nodes import {function} as function"
    become = ""
    if os.getuid() == 0:  # once all is imported: not every folder on Python's path need be open to others
        become = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    else:
        for node in ("nvmap", "dri/renderD128"):
            with suppress(OSError):  # a link to nowhere, or in a folder that is closed
                (root / "dev" / node).chmod(0)
    code = "\n".join((imports, become, f"print(function(pathlib.Path({str(root)!r})))"))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_the_nodes_of_a_jetson_are_known(root: Path) -> None:
    assert [str(node.relative_to(root / "dev")) for node in device_nodes(root)] == [
        "nvmap",
        "nvhost-gpu",
        "dri/renderD128",
    ]


def test_those_that_may_not_be_opened_are_named_with_their_groups(root: Path) -> None:
    (root / "dev/nvmap").chmod(0o660)
    said = as_a_stranger(root, "closed_nodes")
    group = (root / "dev/nvmap").stat().st_gid
    assert "/dev/nvmap (group " in said
    assert f"/dev/dri/renderD128 (group {'root, ' if group == 0 else ''}" in said
    assert "nvhost-gpu" not in said


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["closed", "listed, and no more"])
def test_a_folder_that_may_not_be_looked_into_is_named_itself(root: Path, mode: int) -> None:
    (root / "dev/dri").chmod(mode)
    said = as_a_stranger(root, "closed_nodes")
    assert "/dev/dri (group " in said
    assert "renderD128" not in said


def test_a_link_to_nowhere_is_no_node(root: Path) -> None:
    (root / "dev/nvmap").unlink()
    (root / "dev/nvmap").symlink_to(root / "dev/gone")
    assert "nvmap" not in as_a_stranger(root, "closed_nodes")


def test_the_advice_says_how_to_get_in(root: Path) -> None:
    said = as_a_stranger(root, "advice")
    assert "may not open /dev/nvmap (group " in said
    assert "--group-add" in said


def test_who_may_open_all_is_told_nothing(root: Path) -> None:
    for node in NODES:
        (root / "dev" / node).chmod(0o666)
    assert closed_nodes(root) == []
    assert advice(root) == ""


def test_another_makers_render_node_is_no_nvidia_gpu(tmp_path: Path) -> None:
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/renderD128").touch()
    assert device_nodes(tmp_path) == []
