"""Files that cannot be written are one line without a traceback, and what was there stays."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from processes import TRIMRT
from small_kit import write_small_kit
from tiny_engine import write_package

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


ROOT = Path(__file__).parents[2]
IN_NAMESPACE = ["unshare", "--map-root-user", "--mount"]
AS_NOBODY = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]  # of whom no passwd file knows

needs_namespaces = pytest.mark.skipif(
    subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, check=False).returncode != 0,
    reason="this user may not make namespaces",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an engine, a kit and photographs, and an empty one to be mounted on."""
    folder = tmp_path_factory.mktemp("place")
    package = write_package(folder / "engines")
    (package / "model.onnx").write_bytes((package / "source.onnx").read_bytes())
    write_small_kit(folder / "kit")
    (folder / "mount").mkdir()
    (folder / "7.png").write_bytes((ROOT / "docs/images/7.png").read_bytes())
    return folder


READ_ONLY = ("ro", r"Read-only file system|cannot write", [])
FULL = ("size=4k", r"No space left on device", ["mount/full"])
WRITERS = {
    "build kit -p fp32 --target openvino -o mount/engines": (READ_ONLY, FULL),
    "predict 7.png --engine tiny --out mount/labels.csv": (READ_ONLY, FULL),
    "export-triton tiny mount/repository": (READ_ONLY, FULL),
    "prepare digits-resnet18 -p fp32 -o mount/kit": (READ_ONLY,),
    "compress digits --out mount/run": (READ_ONLY,),
}


@needs_namespaces
@pytest.mark.parametrize(
    ("arguments", "options", "reason", "left"),
    [(arguments, *kind) for arguments, kinds in WRITERS.items() for kind in kinds],
    ids=[f"{arguments.split()[0]} {kind[0]}" for arguments, kinds in WRITERS.items() for kind in kinds],
)
def test_a_disk_that_takes_nothing_is_one_line_and_nothing_is_left(
    place: Path, arguments: str, options: str, reason: str, left: list[str]
) -> None:
    mounting = f"mount -t tmpfs -o {options} none mount"
    fill = "dd if=/dev/zero of=mount/full bs=4k count=2 2>/dev/null" if left else "true"
    script = f'{mounting} && {{ {fill}; "$0" "$@"; }}; find mount -type f'

    done = subprocess.run(
        [*IN_NAMESPACE, "sh", "-c", script, TRIMRT, *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
    )

    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, done.stderr
    assert re.search(reason, said[0])
    assert "mount" in said[0] or "are scored" in said[0]
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == left


@needs_namespaces
def test_a_user_without_name_and_home_runs_engines(place: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TRIMRT_CACHE")}
    command = [*AS_NOBODY, TRIMRT, "bench", "tiny", "--seconds", "0.01", "--warm-up", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)
    assert (done.returncode, done.stderr.strip()) == (0, "")


@needs_namespaces
@pytest.mark.parametrize(
    ("home", "says"),
    [
        (None, "this user has no home folder to unpack data sets in; name a folder in TRIMRT_CACHE"),
        pytest.param("/proc", "cannot unpack digits in /proc/.cache/trimrt: ", marks=pytest.mark.slow),
    ],
)
def test_a_user_without_a_place_for_data_sets_is_told_where_to_name_one(
    place: Path, home: str | None, says: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TRIMRT_CACHE")}
    environment |= {"HOME": home} if home else {}
    command = [*AS_NOBODY, TRIMRT, "compress", "digits", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "run").exists()
