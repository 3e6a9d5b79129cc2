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


def find_libraries(root: Path) -> list[Path]:
    """TensorRT's shared libraries: `libnvinfer.so.10`, not `libnvinfer.so.10.3.0` or `libnvinfer.so`."""
    return [
        path
        for path in sorted(root.glob("usr/lib/*-linux-gnu/libnv*.so.*"))
        for name in LIBRARIES
        if path.name.startswith(name) and path.name.removeprefix(name).isdigit()
    ]


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


def collect(root: Path, into: Path, *, required: bool) -> list[str]:
    """Copy TensorRT from `root` to `into/lib` and `into/python`, and say what was copied.

    Raises:
        SystemExit: it is not complete.
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
    options = parser.parse_args()
    copied = collect(options.root, options.into, required=options.tensorrt == "required")
    print("\n".join(copied) or "no TensorRT here")
