"""`trimrt demo`: from the shipped student to a served, measured prediction, by the commands a user types."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from models.card import Card, read_card
from models.datasets import ImageSet, reopen_dataset
from models.pretrained import DIGITS_STUDENT
from runtime.loading import load_engine
from runtime.manifest import EngineError, read_manifest
from trimrt.options import ENGINES, FOLDER, HELP, Command

PRECISIONS: Final = ("fp32", "fp16", "int8")

_START_SECONDS: Final = 60


@click.command(
    cls=Command, context_settings=HELP, examples=["trimrt demo", "trimrt demo --engine-dir my-engines"]
)
@click.option("--engine-dir", type=FOLDER, default=ENGINES, help="Where the engine packages go.")
def demo(engine_dir: Path) -> None:
    """Do it all once, on handwritten digits: build engines, serve one, ask it, compare them.

    A second run reuses the engines of the first.
    """
    from trimrt.demo.comparison import compare

    console = Console()
    card = read_card(DIGITS_STUDENT)
    test = reopen_dataset(card.dataset).test
    _heading(console, "1  The student", f"{card.name} ships with TrimRT; it was made by")
    _show_command(console, card.command)

    _heading(console, "2  Build", "ONNX, precision, calibration, compilation, accuracy gate")
    engines = _build(console, card, engine_dir)

    _heading(console, "3  Serve", "the INT8 engine, on loopback, and ask it about a held-out image")
    _serve_and_predict(console, engines["int8"], test)

    _heading(console, "4  Compare", f"{card.metrics.images} test images that no training or calibration saw")
    console.print(compare(DIGITS_STUDENT, list(engines.values()), test))
    console.print(
        f"\nNext:  [bold]{_folder()}trimrt serve --engine {engines['int8']}[/] starts the server "
        f"(http://127.0.0.1:8000), [bold]{_folder()}trimrt --help[/] lists all commands.",
        highlight=False,
        soft_wrap=True,
    )


def _folder() -> str:
    """What to type before the command here."""
    return "" if shutil.which("trimrt") else f"{os.path.relpath(Path(sys.executable).parent)}/"


def _heading(console: Console, title: str, text: str) -> None:
    console.print(f"\n[bold]{title}[/]: {text}", highlight=False)


def _show_command(console: Console, command: str) -> None:
    console.print(f"   [dim]$ {command}[/]", highlight=False, soft_wrap=True)


def _build(console: Console, card: Card, engine_dir: Path) -> dict[str, Path]:
    """Engine packages of the student by precision; those built before from the same weights are kept."""
    folders = {precision: engine_dir / f"{card.name}-{precision}-openvino" for precision in PRECISIONS}
    missing = [precision for precision, folder in folders.items() if not _is_current(folder, card)]
    if len(missing) < len(PRECISIONS):
        kept = ", ".join(precision for precision in PRECISIONS if precision not in missing)
        console.print(f"   built already: {kept}", highlight=False)
    if missing:
        arguments = ["build", os.path.relpath(DIGITS_STUDENT), "--precision", ",".join(missing)]
        arguments += ["--target", "openvino", "--output", str(engine_dir)]
        _show_command(console, shlex.join(["trimrt", *arguments]))
        if subprocess.run([sys.executable, "-m", "trimrt", *arguments], check=False).returncode:
            raise click.ClickException("the build failed; the lines above say why")
    return folders


def _is_current(folder: Path, card: Card) -> bool:
    try:
        manifest = read_manifest(folder)
        load_engine(folder).close()
    except EngineError:
        return False
    return manifest.provenance.checkpoint_sha256 == card.weights_sha256


def _serve_and_predict(console: Console, folder: Path, test: ImageSet) -> None:
    image, label = test.paths[0], test.labels[test.targets[0]]
    with _server(console, folder) as url:
        _show_command(console, f"curl -F file=@{image.name} {url}/predict")
        answer = _post_image(f"{url}/predict?top_k=3", image)
    result = answer["results"][0]
    guesses = ", ".join(f"{guess['label']} ({guess['probability']:.1%})" for guess in result["predictions"])
    stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in result["latency_ms"].items())
    lines = f"   prediction  [bold]{guesses}[/]; the image shows a {label}\n"
    lines += f"   latency     {stages} ms, in a batch of {result['batch_size']}"
    console.print(lines, highlight=False, soft_wrap=True)
    if result["predictions"][0]["label"] != label:
        raise click.ClickException(f"the engine took {image} for a {result['predictions'][0]['label']}")


@contextmanager
def _server(console: Console, folder: Path) -> Iterator[str]:
    """`trimrt serve` as a process of its own, for as long as the context lasts; its address."""
    arguments = ["serve", "--engine", str(folder), "--port", "0", "--log-format", "json"]
    _show_command(console, shlex.join(["trimrt", *arguments]))
    process = subprocess.Popen(
        [sys.executable, "-m", "trimrt", *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        yield _wait_until_ready(process)
    finally:
        process.terminate()
        status = process.wait(_START_SECONDS)
    if status:
        raise click.ClickException(f"the server ended with exit code {status}")


def _wait_until_ready(process: subprocess.Popen[str]) -> str:
    """The server's address, once it answers that it is ready."""
    log = []
    assert process.stderr is not None
    for line in process.stderr:
        log.append(line)
        entry = json.loads(line) if line.startswith("{") else {}
        if "url" in entry:
            url: str = entry["url"]
            break
    else:
        raise click.ClickException("the server did not start:\n" + "".join(log))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return url
        except OSError:  # not ready yet
            time.sleep(0.05)
    raise click.ClickException("the server did not become ready:\n" + "".join(log))


def _post_image(url: str, image: Path) -> Any:
    request = urllib.request.Request(url, image.read_bytes(), {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=_START_SECONDS) as response:
        return json.load(response)
