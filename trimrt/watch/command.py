"""`trimrt watch`."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import orjson

from models.errors import TrimRTError
from runtime.packages import resolve_package
from runtime.signatures import Trust
from trimrt.options import COUNT, HELP, Command, engine_dir_option, trusted_key_option

if TYPE_CHECKING:
    from trimrt.watch.asking import Ask, Labelled

_TIMED: Final = 10_000  # frames, the newest, whose times the summary is made of
_TOP_K: Final = 5


@click.command(
    cls=Command,
    context_settings=HELP,
    examples=[
        "trimrt watch 0 --engine digits-resnet18-int8-openvino",
        "trimrt watch rtsp://camera.local/1 --url http://127.0.0.1:8000",
        "trimrt watch film.mp4 --url http://127.0.0.1:8000 --json",
    ],
)
@click.argument("source", metavar="DEVICE|URL|FILE")
@click.option("--url", help="Ask this server, which has the engine.")
@click.option("--engine", help="Engine to ask, here or on the server; the server's default one if absent.")
@engine_dir_option
@trusted_key_option
@click.option("--api-key", envvar="TRIMRT_API_KEY", help="Where the server asks for it.  [TRIMRT_API_KEY]")
@click.option("--top-k", type=COUNT, default=None, help=f"Labels a frame.  [default: {_TOP_K} or all]")
@click.option("--frames", type=COUNT, default=None, help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="Print every frame as a line of JSON, for programs.")
def watch(
    source: str,
    url: str | None,
    engine: str | None,
    engine_dir: Path,
    trust: Trust,
    api_key: str | None,
    top_k: int | None,
    frames: int | None,
    as_json: bool,
) -> None:
    """Label live video, or a film: on a server, or with an engine here.

    DEVICE is a camera's number, from 0. Of what is live the newest frame is asked for, and those that came
    meanwhile are left out; of a file every frame is. A line is printed whenever the likeliest label
    changes.
    """
    from trimrt.watch.asking import open_engine, open_server
    from trimrt.watch.sources import open_source

    asking: AbstractContextManager[Ask]
    if url is not None:
        asking = open_server(url, engine, top_k, api_key)
    elif engine is not None:
        asking = open_engine(resolve_package(engine, engine_dir, trust), top_k or _TOP_K, trust)
    else:
        raise click.UsageError("who is to label the frames? Give --engine, or a server's --url")
    with open_source(source) as coming, asking as ask:
        watched = _Watched(as_json)
        try:
            for frame in itertools.islice(coming, frames):
                began = time.monotonic()
                watched.take(ask(frame.image), frame.left_out, time.monotonic() - began)
        except KeyboardInterrupt:
            pass
        finally:
            watched.sum_up()
    if not watched.labelled:
        raise TrimRTError(f"no frame of {source} was labelled")


class _Watched:
    """What was seen, printed as it comes."""

    def __init__(self, as_json: bool) -> None:
        self.labelled = 0
        self._as_json = as_json
        self._began = time.monotonic()
        self._number = 0
        self._left_out = 0
        self._failed = 0
        self._shown = ""
        self._times: deque[float] = deque(maxlen=_TIMED)

    def take(self, labels: list[Labelled] | str, left_out: int, seconds: float) -> None:
        """A frame was labelled, in so many seconds, or why it was not."""
        at = time.monotonic() - self._began
        self._left_out += left_out
        if isinstance(labels, str):
            self._failed += 1
            click.echo(f"frame {self._number}: {labels}", err=True)
        else:
            self.labelled += 1
            self._times.append(seconds)
            if self._as_json:
                seen = {
                    "frame": self._number,
                    "seconds": round(at, 3),
                    "left_out": left_out,
                    "latency_ms": round(seconds * 1000, 3),
                    "predictions": [it._asdict() for it in labels],
                }
                click.echo(orjson.dumps(seen))
            elif labels[0].label != self._shown:
                self._shown = labels[0].label
                click.echo(f"{at:8.2f} s  {self._shown}  {labels[0].probability:.1%}")
        self._number += 1

    def sum_up(self) -> None:
        """Say how it went."""
        if not self._times:
            return
        rate = self._number / (time.monotonic() - self._began)
        failed = f", {self._failed} failed" if self._failed else ""
        click.echo(
            f"{self._number} frames, {rate:.1f} a second, {self._left_out} left out{failed}; "
            f"median {statistics.median(self._times) * 1000:.2f} ms",
            err=True,
        )
