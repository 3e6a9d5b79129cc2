"""What commands write for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from models.files import replace_file


class OutputFile(click.Path):
    """An option's file to write; its folder is made.

    That it cannot be written is a usage error at once, not found out after minutes of work.
    """

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        file = Path(os.fsdecode(super().convert(value, param, ctx)))
        folder = file.absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.fail(f"cannot make {folder}: {error.strerror}", param, ctx)
        if not os.access(folder, os.W_OK):
            self.fail(f"cannot write to {folder}; choose another place", param, ctx)
        return file


def write_output(file: Path, text: str) -> None:
    """Write all of `text` or nothing.

    Raises:
        click.ClickException: it cannot be written.
    """
    try:
        with replace_file(file) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot write {file}: {error.strerror}") from error


def milliseconds(value: float) -> str:
    """A time in a table, in at most six characters up to a minute."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
