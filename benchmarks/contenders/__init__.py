"""The servers that are compared: how each is installed, started and asked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import click

Form = Literal["usual", "trimrt"]

REPOSITORY: Final = Path(__file__).parents[2]
BUILD: Final = REPOSITORY / "build" / "benchmarks"
DIGITS: Final = "digits-resnet18-int8-openvino"
"""The engine of the shipped student, a network that takes a tenth of a millisecond."""
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
        workers: how many processes it computes in; None: one for each core, if it can have several.
        label: finds the labels in its answers, best first.
        ready: what answers 200 to a GET once all of its processes can be asked; None: whatever it answers.
    """

    name: str
    title: str
    path: str
    forms: tuple[Form, ...] = ("usual", "trimrt")
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "image/jpeg"})
    workers: int | None = None
    label: re.Pattern[bytes] = re.compile(rb'"label":\s*"([^"]*)"')
    ready: str | None = None

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

    def with_workers(self, workers: int) -> Contender:
        """The same in so many processes."""
        processes = f"{workers} process{'es' * (workers > 1)}"
        return replace(self, title=f"{self.title}, {processes}", workers=workers)

    def body(self, file: bytes) -> bytes:
        """The body of the request that asks for the labels of `file`."""
        return file

    def command(self, package: Path, port: int) -> list[str]:
        """What starts it."""
        python = str(self.environment / "bin" / "python")
        return [python, str(_FOLDER / self.name / "server.py")]

    def variables(self, form: Form, package: Path, port: int) -> dict[str, str]:
        """The environment variables to start it with."""
        workers = {} if self.workers is None else {"BENCHMARK_WORKERS": str(self.workers)}
        return {
            **os.environ,
            **workers,
            "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{_FOLDER}:{REPOSITORY}",
            "BENCHMARK_FORM": form,
            "BENCHMARK_PACKAGE": str(package),
            "BENCHMARK_PORT": str(port),
        }


class TrimRT(Contender):
    """This repository's server, with nothing but its own requirements installed."""

    def command(self, package: Path, port: int) -> list[str]:
        """`trimrt serve`, with no other setting than those of `variables`."""
        return [str(self.environment / "bin" / "trimrt"), "serve"]

    def variables(self, form: Form, package: Path, port: int) -> dict[str, str]:
        """What it serves, where, and in how many processes."""
        settings = {"ENGINE": str(package), "PORT": str(port), "WORKERS": str(self.workers or 1)}
        variables = super().variables(form, package, port)
        return variables | {f"TRIMRT_{name}": value for name, value in settings.items()}


_BOUNDARY: Final = "----a-form-of-one-file"


class TrimRTForm(TrimRT):
    """The image as the file of a form."""

    def body(self, file: bytes) -> bytes:
        """See `Contender`."""
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        return head.encode() + file + f"\r\n--{_BOUNDARY}--\r\n".encode()


class TrimRTV2(TrimRT):
    """The image in base64, as the Open Inference Protocol has it in JSON."""

    def body(self, file: bytes) -> bytes:
        """See `Contender`."""
        data = base64.b64encode(file).decode()
        request = {
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [data]}],
            "outputs": [{"name": "probabilities", "parameters": {"classification": 5}}],
        }
        return json.dumps(request).encode()


class PyTriton(Contender):
    """Its Triton embeds Python, and must find this Python's library rather than the system's."""

    def variables(self, form: Form, package: Path, port: int) -> dict[str, str]:
        """The environment variables to start it with."""
        variables = super().variables(form, package, port)
        return variables | {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}


TRIMRT: Final = TrimRT("trimrt", "TrimRT", "/predict?top_k=5", forms=("trimrt",), ready="/health/ready")

WAYS: Final = {
    "one-process": replace(TRIMRT, title="TrimRT, one process", workers=1),
    "form": TrimRTForm(
        TRIMRT.name,
        "TrimRT, multipart form",
        TRIMRT.path,
        TRIMRT.forms,
        {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"},
        ready=TRIMRT.ready,
    ),
    "v2": TrimRTV2(
        TRIMRT.name,
        "TrimRT, /v2 with BYTES",
        f"/v2/models/{DIGITS}/infer",
        TRIMRT.forms,
        {"Content-Type": "application/json"},
        label=re.compile(rb'"[\d.]+:\d+:([^"]*)"'),
        ready=TRIMRT.ready,
    ),
}
"""Other ways to ask TrimRT, or to run it, which are held against `TRIMRT` as peers are."""

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
