"""NVIDIA's official TensorRT bindings, imported on a machine that has no TensorRT.

The bindings wheels are about 1 MB and carry the whole Python API; what they lack is libnvinfer and
its siblings. Libraries with the right names that define the few factory functions the extension
asks for (and return null from them) are enough to import it: every class, method, signature and
enum is there, nothing can be built or run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trimrt" / "tensorrt-bindings"
DISTRIBUTION = "tensorrt-cu12-bindings"  # the same extension as the cu13 wheel's, and it goes back to 10.3
PROBE = Path(__file__).with_name("probe_api.py")


class BindingsUnavailableError(Exception):
    """The wheel cannot be had here; the message says why."""


@dataclass(frozen=True)
class Bindings:
    """One version of the bindings, unpacked beside its stub libraries."""

    version: str
    module: str
    folder: Path
    stubs: Path | None

    def run(self, code_file: Path, *arguments: str) -> str:
        """Standard output of a Python script run in a process where `import <module>` works."""
        environment = dict(os.environ)
        if self.stubs:
            environment |= {"PYTHONPATH": str(self.folder), "LD_LIBRARY_PATH": str(self.stubs)}
        command = [sys.executable, str(code_file), self.module, *arguments]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert child.returncode == 0, f"{self.module} {self.version}: {child.stderr}"
        return child.stdout

    def api(self) -> dict[str, dict[str, dict[str, object]]]:
        """Owner (class or the module) to member to description, as `probe_api.py` prints it."""
        api: dict[str, dict[str, dict[str, object]]] = json.loads(self.run(PROBE))
        return api


def official_bindings(version: str) -> Bindings:
    """The bindings of `version`, downloaded and given stub libraries once.

    Raises:
        BindingsUnavailableError: no wheel for this interpreter, or no package index within reach.
    """
    folder = CACHE / f"{version}-cp{sys.version_info.major}{sys.version_info.minor}"
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        _unpack(_download(version, unfinished), unfinished)
        _make_stubs(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another test process was faster
            assert folder.is_dir()
    return Bindings(version, "tensorrt", folder, folder / "stubs")


def _download(version: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    child = subprocess.run(
        [*command, "--dest", str(folder), f"{DISTRIBUTION}=={version}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if child.returncode:
        raise BindingsUnavailableError(f"{DISTRIBUTION}=={version}: {child.stderr.strip()[-300:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()
    # The package of this name only re-exports the bindings after it has loaded libraries that are not there.
    (folder / "tensorrt.py").write_text(
        "import sys, tensorrt_bindings\nsys.modules['tensorrt'] = tensorrt_bindings\n"
    )


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
