"""A contender, started and answering."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.answers import ask, wait_for_answer
from benchmarks.contenders import BUILD, Contender, Form
from benchmarks.load import Load, run_wrk
from benchmarks.processes import ProcessTree, running


@dataclass(frozen=True)
class Serving:
    """A server that answers.

    Attributes:
        contender: what it is.
        port: where it listens.
        tree: its processes.
        start_seconds: from the start of its process to its first answer.
    """

    contender: Contender
    port: int
    tree: ProcessTree
    start_seconds: float

    def ask(self, file: bytes) -> tuple[str, ...]:
        """The labels of one photograph, best first."""
        return ask(self.port, self.contender.path, self.contender.headers, file)

    def load(self, files: list[Path], connections: int, seconds: float) -> tuple[Load, float]:
        """What `wrk` saw, and the processor milliseconds of the server for one request."""
        url = f"http://127.0.0.1:{self.port}{self.contender.path}"
        cpu = self.tree.cpu_seconds()
        load = run_wrk(url, files, connections=connections, seconds=seconds, headers=self.contender.headers)
        return load, 1000 * (self.tree.cpu_seconds() - cpu) / max(1, load.requests)


@contextmanager
def serving(
    contender: Contender,
    form: Form,
    engines: Path,
    first: bytes,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Serving]:
    """The contender, from its first answer (to the photograph `first`) until the block ends.

    Raises:
        click.ClickException: it does not start, or whatever click raises inside the block; the message
            names the server and its log.
    """
    port = free_port()
    log = BUILD / f"{contender.name}-{form}.log"
    variables = contender.variables(form, engines, port) | dict(settings or {})
    started = time.perf_counter()
    try:
        with running(contender.command(engines, port), variables, log) as tree:
            wait_for_answer(tree, port, contender.path, contender.headers, first)
            yield Serving(contender, port, tree, time.perf_counter() - started)
    except click.ClickException as error:
        raise click.ClickException(f"{contender.title} ({form}): {error.message}; see {log}") from error


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
