"""The limit's process, started and waiting for its turns."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from benchmarks.contenders import REPOSITORY
from benchmarks.limit import Settings
from benchmarks.load import Round


@dataclass(frozen=True)
class Unserved:
    """A loop without a server; between its turns it waits, which costs nothing."""

    settings: Settings
    _process: subprocess.Popen[str]
    _log: Path

    def round(self, what: Literal["throughput", "latency"], seconds: float) -> Round:
        """Let it work for so many seconds.

        Raises:
            click.ClickException: it ended instead.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what is read tells
            self._process.stdin.write(f"{what} {seconds}\n")
            self._process.stdin.flush()
        return Round.model_validate_json(_line(self._process, self._log))


@contextmanager
def unserved(python: Path, package: Path, files: Sequence[Path], log: Path) -> Iterator[Unserved]:
    """The loop over `files` in the environment of `python`, once it has found its best settings.

    Raises:
        click.ClickException: it does not start.
    """
    command = [str(python), "-m", "benchmarks.limit", str(package), *map(str, files)]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            settings = Settings.model_validate_json(_line(process, log))
            yield Unserved(settings, process, log)
        finally:
            process.kill()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()


def _line(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise click.ClickException(f"benchmarks.limit failed; see {log}")
    return line
