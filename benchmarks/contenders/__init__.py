"""The servers that are compared: how each is installed, started and asked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import click

Form = Literal["usual", "trimrt"]

REPOSITORY: Final = Path(__file__).parents[2]
BUILD: Final = REPOSITORY / "build" / "benchmarks"
_FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True)
class Contender:
    """One server.

    Attributes:
        name: its folder here, with `requirements.txt` and (except TrimRT) `server.py`.
        title: its name in tables.
        path: what photographs are posted to.
        forms: see `classifier.py`.
        headers: of every request.
    """

    name: str
    title: str
    path: str
    forms: tuple[Form, ...] = ("usual", "trimrt")
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "image/jpeg"})

    @property
    def environment(self) -> Path:
        """Its virtual environment."""
        return BUILD / self.name

    def install(self) -> None:
        """Make its virtual environment, unless it is there as `requirements.txt` wants it.

        Raises:
            click.ClickException: pip failed.
        """
        requirements = _FOLDER / self.name / "requirements.txt"
        stamp = self.environment / "requirements.sha256"
        wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.environment], check=True)
        python = str(self.environment / "bin" / "python")
        command = [
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "-q",
            "-r",
            str(requirements),
        ]
        installed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if installed.returncode:
            raise click.ClickException(
                f"{self.title} cannot be installed:\n{installed.stderr.strip()[-2000:]}"
            )
        stamp.write_text(wanted)

    def installed_bytes(self) -> int:
        """Size of its virtual environment on disk."""
        files = (path for path in self.environment.rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_blocks * 512 for path in files)

    def command(self, engines: Path, port: int) -> list[str]:
        """What starts it."""
        python = str(self.environment / "bin" / "python")
        return [python, str(_FOLDER / self.name / "server.py")]

    def variables(self, form: Form, engines: Path, port: int) -> dict[str, str]:
        """The environment variables to start it with."""
        return {
            **os.environ,
            "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{_FOLDER}:{REPOSITORY}",
            "BENCHMARK_FORM": form,
            "BENCHMARK_ENGINES": str(engines),
            "BENCHMARK_PORT": str(port),
        }


@dataclass(frozen=True)
class TrimRT(Contender):
    """This repository's server, with nothing but its own requirements installed.

    Attributes:
        package: the engine package that it serves.
    """

    package: str = "resnet18-int8-openvino"

    def command(self, engines: Path, port: int) -> list[str]:
        """`trimrt serve`, with no other setting than where."""
        program = str(self.environment / "bin" / "trimrt")
        return [program, "serve", "--engine", str(engines / self.package), "--port", str(port)]


class PyTriton(Contender):
    """Its Triton embeds Python, and must find this Python's library rather than the system's."""

    def variables(self, form: Form, engines: Path, port: int) -> dict[str, str]:
        """The environment variables to start it with."""
        variables = super().variables(form, engines, port)
        return variables | {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}


TRIMRT: Final = TrimRT("trimrt", "TrimRT", "/predict?top_k=5", forms=("trimrt",))

PEERS: Final = (
    Contender("mosec", "mosec", "/inference"),
    Contender("litserve", "LitServe", "/predict"),
    Contender("mlserver", "MLServer", "/classify"),
    Contender("bentoml", "BentoML", "/classify"),
    Contender("ray", "Ray Serve", "/"),
    Contender("fastapi", "FastAPI", "/classify"),
    PyTriton(
        "pytriton",
        "PyTriton",
        "/v2/models/classify/infer",
        headers={"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"},
    ),
)
