"""A contender, started and answering."""

from __future__ import annotations

import http.client
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from benchmarks.answers import Labels, ask, wait_for_answer
from benchmarks.contenders import BUILD, Contender, Form
from benchmarks.load import Load, Round, cpu_milliseconds, merge, run_wrk
from benchmarks.processes import ProcessTree, running

_SETTLE_SECONDS: Final = 1.0  # at most
_LOOK_SECONDS: Final = 0.1
_AT_REST: Final = 0.3  # cores


class ServerError(click.ClickException):
    """A contender did not start, or did not do what it was asked; the message names it and its log."""

    def __init__(self, contender: Contender, form: Form, message: str) -> None:
        log = os.path.relpath(_log(contender, form))
        super().__init__(f"{contender.title} ({form}): {message}; see {log}")
        self.contender = contender


@dataclass(frozen=True)
class Serving:
    """A server that answers.

    Attributes:
        contender: what it is.
        form: see `classifier.py`.
        port: where it listens.
        tree: its processes.
        start_seconds: from the start of its process to its first answer.
    """

    contender: Contender
    form: Form
    port: int
    tree: ProcessTree
    start_seconds: float

    def check(self, file: Path, expected: Labels) -> None:
        """Ask for the labels of one photograph.

        Raises:
            ServerError: they are not those expected, best first, or there was no answer.
        """
        with _named(self.contender, self.form):
            answer = ask(self.contender, self.port, file.read_bytes())
            if answer != expected:
                raise click.ClickException(
                    f"wrong labels for {file.name}: {', '.join(answer)} instead of {', '.join(expected)}"
                )

    def round(
        self, files: Sequence[Path], connections: int, seconds: float, paths: Sequence[str] = ()
    ) -> Round:
        """Load it once; for `paths` see `run_wrk`.

        Raises:
            ServerError: `wrk` failed.
        """
        url = f"http://127.0.0.1:{self.port}{self.contender.path}"
        with _named(self.contender, self.form):
            return run_wrk(
                url,
                self._bodies(files),
                connections=connections,
                seconds=seconds,
                headers=self.contender.headers,
                paths=paths,
                cpu_seconds=self.tree.cpu_seconds,
            )

    def _bodies(self, files: Sequence[Path]) -> list[Path]:
        """The files that `wrk` posts: requests for the labels of `files`."""
        bodies = []
        for file in files:
            content = file.read_bytes()
            body = self.contender.body(content)
            if body != content:
                file = file.with_name(f"{file.name}.{type(self.contender).__name__}")
                file.write_bytes(body)
            bodies.append(file)
        return bodies

    def load(
        self, files: Sequence[Path], connections: int, seconds: float, paths: Sequence[str] = ()
    ) -> tuple[Load, float]:
        """What `wrk` saw, and the processor milliseconds of the server for one request."""
        rounds = [self.round(files, connections, seconds, paths)]
        return merge(rounds), cpu_milliseconds(rounds)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the paused server run until the block ends, and until it has done what is left to do."""
        self.tree.resume()
        yield
        self._settle()
        self.tree.pause()

    def _settle(self) -> None:
        """Wait until it has done with the requests that `wrk` did not wait for: no work for its next turn."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        rest = False
        while not rest and time.monotonic() < deadline:
            before = self.tree.cpu_seconds()
            time.sleep(_LOOK_SECONDS)
            rest = self.tree.cpu_seconds() - before < _AT_REST * _LOOK_SECONDS


@contextmanager
def serving(
    contender: Contender,
    form: Form,
    package: Path,
    first: bytes,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Serving]:
    """The contender, from its first answer (to the image `first`) until the block ends.

    Raises:
        ServerError: it does not start.
    """
    port = free_port()
    variables = contender.variables(form, package, port) | dict(settings or {})
    started = time.perf_counter()
    with running(contender.command(package, port), variables, _log(contender, form)) as tree:
        with _named(contender, form):
            wait_for_answer(tree, contender, port, first)
        yield Serving(contender, form, port, tree, time.perf_counter() - started)


@contextmanager
def _named(contender: Contender, form: Form) -> Iterator[None]:
    """Say in the block's errors which server they are of."""
    try:
        yield
    except click.ClickException as error:
        raise ServerError(contender, form, error.message) from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(contender, form, f"no answer: {error}") from error


def _log(contender: Contender, form: Form) -> Path:
    title = re.sub(r"\W+", "-", contender.title).lower()
    return BUILD / f"{title}-{form}.log"


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
