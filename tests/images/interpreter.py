"""JetPack 6's Python is 3.10, which Debian has not: its pins and the project, on this machine's own 3.10."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.serving import free_port
from tests.images.checks import CheckError, Facts, ask, expect
from tests.images.golden import tensors, write_images
from tests.images.podman import BUILD, ROOT

VERSION: Final = "3.10"
_PARTS: Final = ("models", "runtime", "builder", "server", "trimrt", "pyproject.toml", "README.md")


def check_interpreter() -> Facts:
    """Install as Dockerfile.jetson does, preprocess as elsewhere, start the server.

    Raises:
        CheckError: something of it fails.
    """
    found = _find()
    if found is None:
        return {"skipped": f"no Python {VERSION} on this machine"}
    environment = BUILD / f"python{VERSION}"
    python = environment / "bin/python"
    if not python.exists():
        _run(found, "-m", "venv", str(environment))
    pins = ROOT / "deploy/jetson/jetpack6.txt"
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(pins))
    with tempfile.TemporaryDirectory() as name:  # setuptools builds where the source is
        for part in _PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(name) / part)
        _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", name)

    images = BUILD / "golden"
    write_images(images)
    there = json.loads(_run(python, str(Path(__file__).with_name("golden.py")), str(images)))
    expect(there == tensors(images), "the same tensors as with this Python")
    _run(
        python,
        "-c",
        "import trimrt.build, server.app, server.v2.rest, trimrt.serve.command, trimrt.serve.worker",
    )
    return {
        "python": _run(python, "--version").split()[1],
        "tensors_equal": len(there),
        **_serve(environment),
    }


def _find() -> Path | None:
    """Of that version, also where pyenv has it and does not offer it here."""
    asked = [f"python{VERSION}", "-c", "import sys; print(sys.executable)"]
    try:
        said = subprocess.run(
            asked, env={**os.environ, "PYENV_VERSION": VERSION}, capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return Path(said.stdout.strip())


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=BUILD, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"`{' '.join(map(str, command))}` to work:\n{done.stderr[-2000:]}")
    return done.stdout


def _serve(environment: Path) -> Facts:
    port = free_port()
    settings = {"TRIMRT_WATCH": "1", "TRIMRT_PORT": str(port), "TRIMRT_ENGINE_DIR": str(BUILD / "none")}
    command = [str(environment / "bin/trimrt"), "serve"]
    process = subprocess.Popen(command, env={**os.environ, **settings}, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/health"
        while (live := ask(f"{url}/live")[0]) == 0 and process.poll() is None:
            time.sleep(0.1)
        expect(live == 200, "a live server")
        expect(ask(f"{url}/ready")[0] == 503, "no readiness without engine")
        process.terminate()
        if (code := process.wait(60)) != 0:
            raise CheckError(f"expected: exit code 0 after SIGTERM, not {code}")
        return {"exit_code_after_sigterm": code}
    finally:
        process.kill()
