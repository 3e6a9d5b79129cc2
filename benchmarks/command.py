"""What the benchmarks' command lines share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.contenders import BUILD
from trimrt.options import FOLDER


def output_option(files: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option `--output`, a folder for `files`."""
    return click.option(
        "--output",
        default=BUILD / "results",
        type=FOLDER,
        show_default="build/benchmarks/results",
        help=f"Folder for {files}.",
    )


def steps(console: Console | None = None) -> Progress:
    """A bar that counts steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
