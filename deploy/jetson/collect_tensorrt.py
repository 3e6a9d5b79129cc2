"""Copy TensorRT's runtime out of a full image, so that a small one can have it: no import, no compiler.

A build step of Dockerfile.jetson, run by the image's own Python, without any package.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# What running a plan needs, by the names that the loader asks for; `import tensorrt` loads all three.
LIBRARIES = ("libnvinfer.so.", "libnvinfer_plugin.so.", "libnvonnxparser.so.")
# What TensorRT of JetPack 6 loads besides, and not every image of CUDA's has: cuDLA, as small as harmless.
CUDLA = "libcudla.so.1"

# Which releases build for a Jetson's GPU, as (first, last) of each range: JetPack 6's own end with 10.7,
# JetPack 7 has those for Arm servers, which build for Thor since 10.13, for Orin only since 10.16.
RELEASES = {"87": [((10, 0), (10, 7)), ((10, 16), None)], "110": [((10, 13), None)]}
BOARDS = {"87": "Orin", "110": "Thor"}


def find_libraries(root: Path) -> list[Path]:
    """TensorRT's shared libraries: `libnvinfer.so.10`, not `libnvinfer.so.10.3.0` or `libnvinfer.so`."""
    return [
        path
        for path in sorted(root.glob("usr/lib/*-linux-gnu/libnv*.so.*"))
        for name in LIBRARIES
        if path.name.startswith(name) and path.name.removeprefix(name).isdigit()
    ]


def find_cudla(root: Path) -> list[Path]:
    """CUDA's interface to the DLA, if the image has it."""
    found = sorted(root.glob(f"usr/local/cuda*/targets/*/lib/{CUDLA}"))
    return [path for path in found if path.stat().st_size][:1]


def find_package(root: Path) -> list[Path]:
    """The folders of the Python package `tensorrt`, its metadata among them."""
    return [
        path
        for folder in ("usr/lib/python3*", "usr/local/lib/python3*")
        for path in sorted(root.glob(f"{folder}/*-packages/tensorrt*"))
        if path.name == "tensorrt" or path.name.startswith("tensorrt-")
    ]


def missing(libraries: list[Path], package: list[Path]) -> Iterator[str]:
    """What is not there, or there in name only."""
    for name in LIBRARIES:
        found = [path for path in libraries if path.name.startswith(name)]
        if not found:
            yield f"{name}N is not there"
        # NVIDIA's images have empty files where the container runtime mounts the host's.
        yield from (f"{path} is empty" for path in found if path.stat().st_size == 0)
    if not any(path.name == "tensorrt" for path in package):
        yield "the Python package tensorrt is not there"


def refusal(libraries: list[Path], sm: str) -> str | None:
    """Why this TensorRT builds nothing for a GPU of that SM; None if it does, or its release is not known."""
    names = [path.resolve().name for path in libraries if path.name.startswith("libnvinfer.so.")]
    numbers = names[0].removeprefix("libnvinfer.so.").split(".")[:2] if names else []
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return None
    release = (int(numbers[0]), int(numbers[1]))

    def builds_for(ranges: list[tuple[tuple[int, int], tuple[int, int] | None]]) -> bool:
        return any(first <= release and (last is None or release <= last) for first, last in ranges)

    if builds_for(RELEASES[sm]):
        return None
    others = [f"{each} ({BOARDS[each]})" for each, ranges in RELEASES.items() if builds_for(ranges)]
    return (
        f"TensorRT {'.'.join(numbers)} of this base builds nothing for SM {sm} ({BOARDS[sm]}); "
        f"of Jetsons it knows SM {' and '.join(others) or 'none'}"
    )


def collect(root: Path, into: Path, *, required: bool, sm: str) -> list[str]:
    """Copy TensorRT from `root` to `into/lib` and `into/python`, and say what was copied.

    Raises:
        SystemExit: it is not complete, or not for this GPU.
    """
    libraries, package = find_libraries(root), find_package(root)
    for name in ("lib", "python"):
        (into / name).mkdir(parents=True)
    problems = list(missing(libraries, package))
    if problems and required:
        sys.exit(
            "This base image has no complete TensorRT: " + "; ".join(problems) + ".\n"
            "Choose another with --build-arg BASE_IMAGE=... (docs/containers.md)."
        )
    if required and (reason := refusal(libraries, sm)):
        sys.exit(f"{reason}.\nChoose another with --build-arg BASE_IMAGE=... (docs/containers.md).")
    libraries += find_cudla(root)
    for library in libraries:
        shutil.copy2(library.resolve(), into / "lib" / library.name)
    for path in package:
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, into / "python" / path.name)
    return [str(path) for path in (*libraries, *package)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("/"))
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--tensorrt", choices=("required", "absent"), default="required")
    parser.add_argument("--sm", choices=sorted(RELEASES), default="87")
    options = parser.parse_args()
    required = options.tensorrt == "required"
    copied = collect(options.root, options.into, required=required, sm=options.sm)
    print("\n".join(copied) or "no TensorRT here")
