"""Live video on the page, in a browser: `python -m benchmarks.live_video PACKAGE`.

Chromium shows the page of `trimrt serve`, with a fake camera that plays a film. Camera, browser and server
share the machine: what is measured is what a person sees who has all of them on one. Needs Chromium, and
playwright.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
import numpy as np
from PIL import Image
from pydantic import BaseModel, Field
from rich.console import Console

from benchmarks.command import output_option
from benchmarks.contenders import BUILD
from benchmarks.goals import Goal
from benchmarks.local_clients import TRIMRT
from benchmarks.measurements import Machine, this_machine
from benchmarks.processes import exit_on_sigterm, running
from benchmarks.report import goals_table, markdown_table, write_report
from benchmarks.serving import free_port
from trimrt.options import HELP, Existing

_SIZE: Final = (640, 480)
_CAMERA_FPS: Final = 30  # of Chromium's fake camera
_LEAST_FPS: Final = 20
_MOST_FRAMES: Final = 2
_WARM_UP_S: Final = 3.0
_WIDTH: Final = 1280  # of the page, pixels
_MARGIN: Final = 20  # below what the screenshot shows
_START_S: Final = 60.0
_WAIT_MS: Final = 30_000
_IMAGE: Final = Path(__file__).parents[1] / "docs/images/7.png"
# Notes of each frame when the picture was taken from the camera, and when its answer was there.
_NOTING: Final = """
(() => {
  const taken = [];
  let newest = 0;
  window.answers = [];
  const { drawImage } = CanvasRenderingContext2D.prototype;
  CanvasRenderingContext2D.prototype.drawImage = function (...given) {
    newest = performance.now();
    return drawImage.apply(this, given);
  };
  const { send } = WebSocket.prototype;
  WebSocket.prototype.send = function (frame) {
    if (!taken.length) {
      this.addEventListener("message", ({ data }) => {
        const { frame, dropped } = JSON.parse(data);
        window.answers.push([taken[frame], performance.now(), dropped]);
      });
    }
    taken.push(newest);
    return send.call(this, frame);
  };
})();
"""


class Results(BaseModel):
    """One run of this benchmark."""

    machine: Machine
    engine: str
    seconds: float
    frames: int = Field(description="that were answered")
    dropped: int = Field(description="that gave way to newer ones")
    p50_ms: float = Field(description="from the picture to its labels")
    p99_ms: float

    @property
    def rate(self) -> float:
        """Answered frames a second."""
        return self.frames / self.seconds


def summed_up(
    machine: Machine, engine: str, seconds: float, answers: Sequence[tuple[float, float, int]]
) -> Results:
    """The results of `answers`: when the picture of each was taken and when it came, in ms, and what was
    dropped before it.
    """
    latencies = [came - taken for taken, came, _ in answers]
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (float("inf"), float("inf"))
    return Results(
        machine=machine,
        engine=engine,
        seconds=seconds,
        frames=len(answers),
        dropped=sum(dropped for *_, dropped in answers),
        p50_ms=p50,
        p99_ms=p99,
    )


def markdown(results: Results) -> str:
    """The figures, and the goals."""
    head = ["engine", "frames/s", "p50 ms", "p99 ms", "dropped"]
    row = [
        results.engine,
        f"{results.rate:.1f}",
        f"{results.p50_ms:.1f}",
        f"{results.p99_ms:.1f}",
        str(results.dropped),
    ]
    goals = [
        Goal("frames a second", _LEAST_FPS, None, results.rate),
        Goal("frames of the camera in p99", None, _MOST_FRAMES, results.p99_ms * _CAMERA_FPS / 1000),
    ]
    about = (
        f"{results.machine}; camera of {_CAMERA_FPS} frames a second, Chromium and server on it, "
        f"{results.seconds:.0f} s. Milliseconds from the picture to its labels."
    )
    return "\n".join([about, "", *markdown_table(head, [row], left=1), *goals_table(goals), ""])


def film(image: Path) -> bytes:
    """A second of `image` on black, as a fake camera of Chromium takes it: JPEGs in a row."""
    side = min(_SIZE)
    picture = Image.new("RGB", _SIZE)
    picture.paste(Image.open(image).convert("RGB").resize((side, side)), ((_SIZE[0] - side) // 2, 0))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue() * _CAMERA_FPS


@contextmanager
def _served(package: Path, log: Path) -> Iterator[str]:
    """The address of a server of `package` that is ready."""
    port = free_port()
    command = [str(TRIMRT), "serve", "--engine", str(package), "--port", str(port)]
    with running(command, os.environ, log) as tree:
        deadline = time.monotonic() + _START_S
        while not _answers(port):
            if tree.ended() or time.monotonic() > deadline:
                raise click.ClickException(f"trimrt serve does not start; see {log}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def watch(url: str, video: Path, seconds: float, screenshot: Path | None) -> list[tuple[float, float, int]]:
    """Let the page at `url` watch `video` for `seconds`; see `summed_up` for what is returned.

    Raises:
        click.ClickException: there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise click.ClickException("there is no Chromium here (apt-get install chromium)")
    flags = [
        "--no-sandbox",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={video}",
        "--use-fake-ui-for-media-stream",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": _WIDTH, "height": 1100}, color_scheme="light")
        page.set_default_timeout(_WAIT_MS)
        page.add_init_script(_NOTING)
        page.goto(url)
        page.wait_for_selector("#status.good")
        page.click("#camera")
        page.click("#live")
        page.wait_for_selector("#overlay li")
        page.wait_for_timeout(1000 * _WARM_UP_S)
        page.evaluate("window.answers.length = 0")
        page.wait_for_timeout(1000 * seconds)
        answers: list[tuple[float, float, int]] = page.evaluate("window.answers")
        if screenshot is not None:
            card = page.locator("section.card").first.bounding_box()
            assert card is not None
            height = card["y"] + card["height"] + _MARGIN
            page.screenshot(path=screenshot, clip={"x": 0, "y": 0, "width": _WIDTH, "height": height})
        browser.close()
    return answers


@click.command(context_settings=HELP)
@click.argument("package", type=Existing(file_okay=False))
@click.option("--seconds", default=20.0, help="How long to watch.")
@click.option("--image", default=_IMAGE, type=Existing(dir_okay=False), help="What the camera sees.")
@click.option("--screenshot", type=click.Path(path_type=Path), help="PNG file for a picture of it.")
@output_option("live_video.json and live_video.md")
def main(package: Path, seconds: float, image: Path, screenshot: Path | None, output: Path) -> None:
    """Measure how many frames a second the page's live camera labels, and how late."""
    exit_on_sigterm()
    BUILD.mkdir(parents=True, exist_ok=True)
    video = BUILD / "film.mjpeg"
    video.write_bytes(film(image))
    with _served(package, BUILD / "live-video.log") as url:
        answers = watch(url, video.resolve(), seconds, screenshot)
    results = summed_up(this_machine(), package.name, seconds, answers)
    write_report(results, markdown(results), output / "live_video.json", Console())


if __name__ == "__main__":
    main()
