"""Names in messages: what may have been meant, and the first of many."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

MANY: Final = 10
_ENDS: Final = 3


def did_you_mean(wrong: str, known: Iterable[str], most: int = 1) -> str:
    """A question in brackets, such as ` (did you mean int8?)`; empty where no known name is like `wrong`."""
    by_key: dict[str, str] = {}
    for name in known:
        by_key.setdefault(name.casefold(), name)
    near = [by_key[key] for key in difflib.get_close_matches(wrong.casefold(), by_key, n=most)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def nothing_at(path: Path) -> str:
    """That there is no such file or folder, and what beside it has a name like it."""
    message = f"no such file or folder: {path}"
    try:
        return message + did_you_mean(path.name, (file.name for file in path.parent.iterdir()), most=3)
    except OSError:
        return f"{message}; there is no folder {path.parent}" if not path.parent.is_dir() else message


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join([*names[:most], *([f"{len(names) - most:,} more"] if len(names) > most else [])])


def shortened(labels: Sequence[str]) -> str:
    """Names in an order that matters; of many the first few and the last."""
    if len(labels) <= MANY:
        return ", ".join(labels)
    return f"{', '.join(labels[:_ENDS])}, ... {labels[-1]}"
