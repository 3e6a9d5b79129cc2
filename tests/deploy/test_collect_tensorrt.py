"""The build step that takes TensorRT out of NVIDIA's image, on a file tree like the ones in there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy/jetson/collect_tensorrt.py"
LIBRARIES = "usr/lib/aarch64-linux-gnu"
CUDA = "usr/local/cuda-12.6/targets/aarch64-linux/lib"
PACKAGE = "usr/lib/python3.10/dist-packages"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """JetPack 6's layout, as far as TensorRT goes."""
    libraries, package = tmp_path / LIBRARIES, tmp_path / PACKAGE
    libraries.mkdir(parents=True)
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvinfer_lean", "nvinfer_builder_resource"):
        real = libraries / f"lib{name}.so.10.3.0"
        real.write_bytes(name.encode())
        (libraries / f"lib{name}.so.10").symlink_to(real.name)
        (libraries / f"lib{name}.so").symlink_to(real.name)
    cuda = tmp_path / CUDA
    cuda.mkdir(parents=True)
    (cuda / "libcudla.so.1.0.0").write_bytes(b"cudla")
    (cuda / "libcudla.so.1").symlink_to("libcudla.so.1.0.0")
    for name in ("tensorrt", "tensorrt-10.3.0.dist-info", "tensorrt_lean", "numpy"):
        (package / name).mkdir(parents=True)
        (package / name / "file").write_text(name)
    return tmp_path


@pytest.fixture
def collect(root: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def collect(*options: str) -> subprocess.CompletedProcess[str]:
        # Isolated: it must run in an image that has Python and nothing else.
        command = [
            sys.executable,
            "-I",
            "-S",
            str(SCRIPT),
            "--root",
            str(root),
            "--into",
            str(tmp_path / "into"),
        ]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=False)

    return collect


Collect = Callable[..., subprocess.CompletedProcess[str]]


def test_the_runtime_is_taken_under_the_names_that_the_loader_asks_for(
    collect: Collect, tmp_path: Path
) -> None:
    assert collect().returncode == 0
    taken = {str(path.relative_to(tmp_path / "into")) for path in (tmp_path / "into").glob("*/*")}
    assert taken == {
        *(f"lib/lib{name}.so.10" for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser")),
        "lib/libcudla.so.1",
        *("python/tensorrt", "python/tensorrt-10.3.0.dist-info"),
    }
    library = tmp_path / "into/lib/libnvinfer.so.10"
    assert not library.is_symlink(), "what it points to stays behind"
    assert library.read_bytes() == b"nvinfer"


def test_the_python_package_is_found_where_nvidias_containers_have_it(
    root: Path, collect: Collect, tmp_path: Path
) -> None:
    there = root / "usr/local/lib/python3.12/dist-packages"
    there.parent.mkdir(parents=True)
    (root / PACKAGE).rename(there)
    assert collect().returncode == 0
    assert (tmp_path / "into/python/tensorrt/file").is_file()


@pytest.mark.parametrize("name", ["libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"])
def test_a_missing_library_stops_the_build(root: Path, collect: Collect, name: str) -> None:
    (root / LIBRARIES / name).unlink()
    done = collect()
    assert done.returncode == 1
    assert f"{name[:-2]}N is not there" in done.stderr
    assert "--build-arg BASE_IMAGE" in done.stderr
    assert "Traceback" not in done.stderr


def test_tensorrt_for_servers_needs_no_cudla(root: Path, collect: Collect, tmp_path: Path) -> None:
    (root / CUDA / "libcudla.so.1").unlink()
    assert collect().returncode == 0
    assert not (tmp_path / "into/lib/libcudla.so.1").exists()


def test_an_empty_placeholder_is_not_a_library(root: Path, collect: Collect) -> None:
    (root / LIBRARIES / "libnvinfer.so.10.3.0").write_bytes(b"")
    done = collect()
    assert done.returncode == 1
    assert "libnvinfer.so.10 is empty" in done.stderr


def test_a_missing_python_package_stops_the_build(root: Path, collect: Collect) -> None:
    (root / PACKAGE / "tensorrt").rename(root / "elsewhere")
    done = collect()
    assert done.returncode == 1
    assert "the Python package tensorrt is not there" in done.stderr


def rename(root: Path, release: str) -> None:
    """Make it TensorRT of another release."""
    libraries = root / LIBRARIES
    for real in libraries.glob("*.so.10.3.0"):
        name = real.name.removesuffix(".10.3.0")
        new = real.rename(libraries / f"{name}.{release}")
        (libraries / f"{name}.10").unlink()
        (libraries / f"{name}.{release.split('.')[0]}").symlink_to(new.name)


@pytest.mark.parametrize(
    ("release", "sm"),
    [("10.3.0", "87"), ("10.7.0", "87"), ("10.16.1", "87"), ("11.4.1", "87"), ("10.13.3", "110")],
)
def test_a_release_that_builds_for_this_gpu_is_taken(
    root: Path, collect: Collect, release: str, sm: str
) -> None:
    rename(root, release)
    done = collect("--sm", sm)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("release", "sm", "reason"),
    [
        (
            "10.13.3",
            "87",
            "10.13 of this base builds nothing for SM 87 (Orin); of Jetsons it knows SM 110",
        ),
        (
            "10.3.0",
            "110",
            "10.3 of this base builds nothing for SM 110 (Thor); of Jetsons it knows SM 87",
        ),
        ("10.9.0", "87", "builds nothing for SM 87 (Orin); of Jetsons it knows SM none"),
    ],
)
def test_one_that_does_not_stops_the_build_and_names_the_sms(
    root: Path, collect: Collect, release: str, sm: str, reason: str
) -> None:
    rename(root, release)
    done = collect("--sm", sm)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "--build-arg BASE_IMAGE" in done.stderr


def test_a_base_without_tensorrt_must_be_asked_for(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--root",
        str(tmp_path / "nothing"),
        "--into",
        str(tmp_path / "into"),
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    done = subprocess.run(
        [*command[:-1], str(tmp_path / "other"), "--tensorrt", "absent"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "no TensorRT here\n"
    assert not list((tmp_path / "other").glob("*/*"))
    assert (tmp_path / "other/lib").is_dir(), "what the next stages copy is there"
    assert (tmp_path / "other/python").is_dir()
