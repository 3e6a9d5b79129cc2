"""`python -m tests.images`: build every image without Docker or a registry, and try what can be tried.

Needs root, Podman, runc, debootstrap and, for Jetson's images, QEMU (`make images-check` installs them on
Debian). What was built is kept in `build/images`, so that a second run takes seconds.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

import click

from models.files import replace_file
from tests.images import checks
from tests.images.bases import SUITE, make_base
from tests.images.interpreter import VERSION, check_interpreter
from tests.images.podman import ROOT, ContainerError, build, remove_leftovers, size

RESULTS: Final = Path(__file__).with_name("results.json")
DOCUMENT: Final = ROOT / "docs/containers.md"
MARKER: Final = re.compile(r"(?<=<!-- images -->\n).*?(?=<!-- /images -->)", re.DOTALL)
MOST_BEYOND_BASE: Final = {"cpu": 450_000_000}


@dataclass(frozen=True)
class Image:
    """One image: how it is built here, and what it must do."""

    file: str
    target: str
    architecture: str
    bases: tuple[str, ...]
    check: Callable[[], checks.Facts]

    def arguments(self, base: str) -> dict[str, str]:
        """Build arguments."""
        absent = {"TENSORRT": "absent"} if self.file == "Dockerfile.jetson" else {}
        return {**dict.fromkeys(self.bases, base), **absent}


def tag(name: str) -> str:
    """As compose.yaml and the manifests name it."""
    return f"localhost/trimrt:{name}"


_JETSON_BASES: Final = ("BASE_IMAGE", "RUNTIME_IMAGE")
IMAGES: Final = {
    "cpu": Image("Dockerfile.x86", "cpu", "amd64", ("BASE_IMAGE",), lambda: checks.check_cpu(tag("cpu"))),
    "gpu": Image("Dockerfile.x86", "gpu", "amd64", ("BASE_IMAGE_GPU",), lambda: checks.check_gpu(tag("gpu"))),
    "jetson-builder": Image(
        "Dockerfile.jetson",
        "builder",
        "arm64",
        _JETSON_BASES,
        lambda: checks.check_packages(tag("jetson-builder")),
    ),
    "jetson": Image(
        "Dockerfile.jetson",
        "server",
        "arm64",
        _JETSON_BASES,
        lambda: checks.check_jetson(tag("jetson"), tag("jetson-builder"), tag("cpu")),
    ),
    "ray": Image("Dockerfile.x86", "ray", "amd64", ("BASE_IMAGE",), lambda: checks.check_ray(tag("ray"))),
    "prepare": Image(
        "Dockerfile.x86", "prepare", "amd64", ("BASE_IMAGE",), lambda: checks.check_prepare(tag("prepare"))
    ),
}


PYTHON: Final = f"python{VERSION}"


def examine(name: str) -> dict[str, Any]:
    """Build an image (or install for JetPack's Python), check it, and say what was found."""
    if name == PYTHON:
        return check_interpreter()
    image = IMAGES[name]
    base = make_base(image.architecture)
    build(image.file, image.target, tag(name), image.architecture, image.arguments(base))
    beyond = size(tag(name)) - size(base)
    most = MOST_BEYOND_BASE.get(name)
    checks.expect(most is None or beyond <= most, f"at most {most} bytes beyond the base, not {beyond}")
    return {"base": f"Debian {SUITE}, {image.architecture}", "bytes_beyond_base": beyond, **image.check()}


def table(results: dict[str, Any]) -> str:
    """The part of docs/containers.md that figures are in."""
    lines = [
        "| image | beyond its base | packages | of them for training | stand-in for its base | checked |",
        "|---|--:|--:|--:|---|---|",
    ]
    for name in IMAGES:
        facts = results["checks"].get(name)
        if facts is not None:
            megabytes = f"{facts['bytes_beyond_base'] / 1e6:,.0f} MB"
            lines.append(
                f"| `trimrt:{name}` | {megabytes} | {facts['packages']} | {len(facts['training_libraries'])} "
                f"| {facts['base']} | {facts['date']} |"
            )
    return "\n".join([*lines, "", f"Measured on {results['machine']}.", ""])


def write(results: dict[str, Any]) -> None:
    """Write the results, and the table in the documentation."""
    with replace_file(RESULTS) as new:
        new.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    text = MARKER.sub(lambda _: table(results), DOCUMENT.read_text("utf-8"))
    with replace_file(DOCUMENT) as new:
        new.write_text(text, "utf-8")


def machine() -> str:
    """This one, by its processor."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    return f"{found[1] if found else platform.machine()} (without GPU; Arm emulated by QEMU)"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*IMAGES, PYTHON]))
def main(names: tuple[str, ...]) -> None:
    """Build and check the images NAMES, or all of them, and the project on JetPack 6's Python."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"checks": {}}
    remove_leftovers()
    for name in names or (*IMAGES, PYTHON):
        click.echo(f"{name}:")
        try:
            facts = examine(name)
        except (ContainerError, checks.CheckError) as error:
            sys.exit(f"{name}: {error}")
        click.echo(json.dumps(facts, indent=2))
        results = {
            "machine": machine(),
            "checks": {**results["checks"], name: {"date": date.today().isoformat(), **facts}},
        }
        write(results)


if __name__ == "__main__":
    main()
