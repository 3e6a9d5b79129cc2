"""Are a server's answers right? Asked before it is timed."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import click

from benchmarks.contenders import Contender, Form
from benchmarks.processes import ProcessTree

_START_SECONDS: Final = 120
_ANSWER_SECONDS: Final = 30
_POLL_SECONDS: Final = 0.02

Labels = tuple[str, ...]


def expected_labels(package: Path, form: Form, files: Sequence[bytes]) -> list[Labels]:
    """The five best labels of each file, by the network in this process."""
    from benchmarks.contenders.classifier import Classifier

    answers = Classifier(threads=1, form=form, package=package).classify(files)
    return [tuple(prediction["label"] for prediction in answer["predictions"]) for answer in answers]


def post(contender: Contender, port: int, file: bytes) -> bytes:
    """The server's answer to an image file.

    Raises:
        OSError, http.client.HTTPException: it does not answer.
        click.ClickException: it answers with an error.
    """
    return _request(port, "POST", contender.path, contender.body(file), contender.headers)


def _request(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)) as connection:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        body = response.read()
    if response.status != 200:
        raise click.ClickException(f"HTTP {response.status}: {body[:500].decode(errors='replace')}")
    return body


def ask(contender: Contender, port: int, file: bytes) -> Labels:
    """The labels that the server answers, best first; errors as of `post`."""
    return tuple(label.decode() for label in contender.label.findall(post(contender, port, file)))


def wait_for_answer(tree: ProcessTree, contender: Contender, port: int, file: bytes) -> None:
    """Return once the server answers `file`.

    Raises:
        click.ClickException: its process ended, or two minutes passed.
    """
    deadline = time.monotonic() + _START_SECONDS
    reason = "no connection"
    while time.monotonic() < deadline:
        if tree.ended():
            raise click.ClickException("it ended before it answered")
        try:
            if contender.ready is not None:
                _request(port, "GET", contender.ready)
            ask(contender, port, file)
        except (OSError, http.client.HTTPException, click.ClickException) as error:
            reason = str(error)
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise click.ClickException(f"it does not answer: {reason}")
