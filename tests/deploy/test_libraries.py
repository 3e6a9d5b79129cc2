"""Which shared libraries an image lacks: asked of real ones, as it is asked inside the images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images import libraries

ABSENT = "libabsent-trimrt.so.1"


def compile_library(path: Path, *options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-x", "none"]
    subprocess.run([*command, "-o", str(path), *options], check=True, capture_output=True)
    return path


def missing(*arguments: str | Path, **environment: str) -> dict[str, list[str]]:
    command = [sys.executable, libraries.__file__, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.fixture
def absent(tmp_path: Path) -> Path:
    return compile_library(tmp_path / "elsewhere" / ABSENT, f"-Wl,-soname,{ABSENT}")


@pytest.fixture
def asking(tmp_path: Path, absent: Path) -> Path:
    return compile_library(tmp_path / "package/core.so", "-Wl,--no-as-needed", str(absent))


def test_a_library_that_is_nowhere_is_named_with_the_file_that_asks_for_it(asking: Path) -> None:
    assert missing(asking.parent) == {ABSENT: [str(asking)]}


def test_the_loader_looks_where_the_environment_says(asking: Path, absent: Path) -> None:
    assert missing(asking.parent, LD_LIBRARY_PATH=f"/nowhere:{absent.parent}") == {}


@pytest.mark.parametrize("kind", ["--enable-new-dtags", "--disable-new-dtags"], ids=["runpath", "rpath"])
def test_the_loader_looks_where_the_file_says(tmp_path: Path, absent: Path, kind: str) -> None:
    options = ("-Wl,--no-as-needed", str(absent), f"-Wl,{kind}", "-Wl,-rpath,$ORIGIN/../elsewhere")
    asking = compile_library(tmp_path / "package/core.so", *options)
    assert missing(asking.parent) == {}
    absent.unlink()
    assert missing(asking.parent) == {ABSENT: [str(asking)]}


@pytest.mark.parametrize(
    ("kind", "found"),
    [("--disable-new-dtags", True), ("--enable-new-dtags", False)],
    ids=["rpath", "runpath"],
)
def test_what_is_loaded_because_of_a_file_is_looked_for_as_the_loader_does(
    tmp_path: Path, absent: Path, kind: str, found: bool
) -> None:
    """As in wheels for Arm: of libraries that ask for each other, only what loads the first says where."""
    inner = absent.with_name("libinner-trimrt.so")
    compile_library(inner, f"-Wl,-soname,{inner.name}", "-Wl,--no-as-needed", str(absent))
    options = ("-Wl,--no-as-needed", str(inner), f"-Wl,{kind}", "-Wl,-rpath,$ORIGIN/../elsewhere")
    outer = compile_library(tmp_path / "package/core.so", *options)
    loaded = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(outer)!r})"],
        capture_output=True,
        check=False,
    )
    assert (loaded.returncode == 0) == found
    assert missing(tmp_path) == ({} if found else {ABSENT: [str(inner)]})


def test_libraries_of_the_system_are_found(tmp_path: Path) -> None:
    asking = compile_library(tmp_path / "core.so", "-Wl,--no-as-needed", "-lm")
    assert "libm.so.6" in libraries.needed(asking.read_bytes())[0]
    assert missing(tmp_path) == {}


def test_what_another_program_asks_for_is_looked_for_too(tmp_path: Path) -> None:
    assert missing(tmp_path, "--also", "libc.so.6", ABSENT) == {ABSENT: []}


def test_files_that_are_no_libraries_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "libscript.so").write_text("GROUP ( libabsent.so.1 )\n")
    (tmp_path / "empty.so").touch()
    (tmp_path / "link.so").symlink_to("nowhere")
    (tmp_path / "folder.so").mkdir()
    assert missing(tmp_path) == {}
