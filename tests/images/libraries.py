"""Which shared libraries programs ask for that an image has not.

The file runs inside an image, by its own Python without any package: `python3 libraries.py FOLDER... --also
NAME...` prints each missing library with the files that ask for it, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

# Of ELF, in 64 bits and little-endian.
_MAGIC: Final = b"\x7fELF\x02\x01"
_LOADED, _DYNAMIC = 1, 2  # kinds of segments
_NEEDED, _NAMES, _RPATH, _RUNPATH = 1, 5, 15, 29  # tags of the dynamic segment

# What TensorRT 10.3 of JetPack 6 asks for beyond the C and C++ libraries: from public reports of `ldd` and of
# the loader's errors (jetson-inference 1653 and 1920, balena-jetson-orin 519, nvidia-container-runtime 124).
TENSORRT_NEEDS: Final = ("libcudla.so.1", "libnvdla_compiler.so")
# What NVIDIA's container runtime mounts from the host's /usr/lib/aarch64-linux-gnu/nvidia: libcuda by public
# listings of `drivers.csv` of Jetson Linux r36, libnvdla_compiler by NVIDIA's staff in jetson-containers 644.
MOUNTED: Final = frozenset({"libcuda.so.1", "libnvdla_compiler.so"})


class Segment(NamedTuple):
    """A part of a file, and where it lies in memory."""

    kind: int
    offset: int
    address: int
    size: int


class Asked(NamedTuple):
    """Names of the libraries that a file asks for, and the folders that it says to look into."""

    libraries: list[str]
    rpath: list[str]
    runpath: list[str]


def needed(content: bytes) -> Asked:
    """What an ELF file asks for."""
    (headers,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    segments = []
    for place in range(headers, headers + size * count, size):
        kind, _flags, offset, address, _physical, length = struct.unpack_from("<IIQQQQ", content, place)
        segments.append(Segment(kind, offset, address, length))
    dynamic = next((segment for segment in segments if segment.kind == _DYNAMIC), None)
    if dynamic is None:
        return Asked([], [], [])
    entries = list(
        struct.iter_unpack("<qQ", content[dynamic.offset : dynamic.offset + dynamic.size // 16 * 16])
    )
    (names,) = (value for tag, value in entries if tag == _NAMES)
    holder = next(s for s in segments if s.kind == _LOADED and s.address <= names < s.address + s.size)

    def text(value: int) -> str:
        start = names - holder.address + holder.offset + value
        return content[start : content.index(b"\0", start)].decode()

    def texts(wanted: int) -> list[str]:
        return [text(value) for tag, value in entries if tag == wanted]

    rpath, runpath = (":".join(texts(tag)).split(":") for tag in (_RPATH, _RUNPATH))
    return Asked(texts(_NEEDED), [*filter(None, rpath)], [*filter(None, runpath)])


def loader_folders(environment: Mapping[str, str]) -> list[Path]:
    """Where the loader looks for all libraries."""
    configured = [
        line.strip()
        for path in sorted(Path("/etc/ld.so.conf.d").glob("*.conf"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("/")
    ]
    listed = environment.get("LD_LIBRARY_PATH", "").split(":")
    return [Path(folder) for folder in (*listed, *configured, "/lib", "/usr/lib", "/lib64") if folder]


def is_elf(path: Path) -> bool:
    """Whether it is a file that this module can read."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def missing(folders: list[Path], everywhere: list[Path]) -> Iterator[tuple[str, Path]]:
    """The libraries that files below the folders ask for and that are nowhere, each with the file.

    A file's RPATH holds for whatever is loaded because of it, its RUNPATH for itself alone.
    """
    files = {path.resolve() for folder in folders for path in folder.rglob("*.so*") if is_elf(path)}
    asked = {path: needed(path.read_bytes()) for path in sorted(files)}
    inherited: dict[Path, set[Path]] = {path: set() for path in asked}

    def resolved(path: Path, listed: list[str]) -> set[Path]:
        return {Path(folder.replace("$ORIGIN", str(path.parent))) for folder in listed}

    def found(name: str, path: Path) -> Path | None:
        asks = asked[path]
        own = resolved(path, asks.runpath) if asks.runpath else resolved(path, asks.rpath) | inherited[path]
        return next(
            ((place / name).resolve() for place in (*own, *everywhere) if (place / name).exists()), None
        )

    waiting = list(asked)
    while waiting:
        path = waiting.pop()
        asks = asked[path]
        handed = inherited[path] | (set() if asks.runpath else resolved(path, asks.rpath))
        for name in asks.libraries:
            library = found(name, path)
            if library in inherited and not handed <= inherited[library]:
                inherited[library] |= handed
                waiting.append(library)
    for path, asks in asked.items():
        yield from ((name, path) for name in asks.libraries if found(name, path) is None)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--also", nargs="*", default=[], help="libraries that something else asks for")
    options = parser.parse_args()
    everywhere = loader_folders(os.environ)
    found: dict[str, list[str]] = {
        name: [] for name in options.also if not any((place / name).exists() for place in everywhere)
    }
    for name, path in missing(options.folders, everywhere):
        found.setdefault(name, []).append(str(path))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
