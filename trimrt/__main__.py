"""Where the process of the `trimrt` command begins; `python -m trimrt` is the same."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import click

import trimrt

_OWN: Final = ("models", "runtime", "builder", "server")


def run() -> None:
    """Run the command line in a process of its own."""
    try:
        _check_packages()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    # One image is one thread's work; parallelism is across images. OpenCV reads this when it is loaded.
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")
    from trimrt.cli import main  # which imports those packages

    main()


def _check_packages() -> None:
    """Find out now that a package of the same name comes first, not by an error from the middle of an import.

    Raises:
        click.ClickException: it says which, and what to do.
    """
    root = Path(trimrt.__file__).parents[1]
    for name in _OWN:
        spec = find_spec(name)
        found = Path(spec.origin) if spec and spec.origin else None
        if found is None:
            raise click.ClickException(f"TrimRT's package `{name}` is missing; install TrimRT again")
        if found.resolve().parent != (root / name).resolve():
            folder = found.parent if found.name == "__init__.py" else found
            raise click.ClickException(
                f"{folder} hides TrimRT's package `{name}`; take {folder.parent} out of PYTHONPATH, "
                "or start `trimrt` instead of `python -m trimrt`"
            )


if __name__ == "__main__":
    run()
