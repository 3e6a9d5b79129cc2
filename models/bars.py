"""Work on many files, with a bar for people who wait: in the display that runs, or by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.cores import cores

_SILENT_SECONDS: Final = 2.0

_running: ContextVar[Progress | None] = ContextVar("running", default=None)

_T = TypeVar("_T")
_R = TypeVar("_R")


@contextmanager
def bars_in(display: Progress) -> Iterator[None]:
    """While the block runs, bars are lines of `display`: two displays would write over each other."""
    token = _running.set(display)
    try:
        yield
    finally:
        _running.reset(token)


def for_each(function: Callable[[_T], _R], items: Sequence[_T], text: str, progress: bool = True) -> list[_R]:
    """`function` of all `items` by a few threads; after two seconds a bar shows how far they are."""
    with ThreadPoolExecutor(min(8, cores())) as pool:
        try:
            results: Iterable[_R] = pool.map(function, items)
            if progress:
                results = _watched(results, len(items), text)
            return list(results)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _watched(results: Iterable[_R], total: int, text: str) -> Iterator[_R]:
    display, beginning = _running.get(), time.monotonic()
    alone, visible = display is None, False
    if display is None:
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
        console = Console(stderr=True)
        display = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = display.add_task(text, total=total, visible=False)
    try:
        for result in results:
            display.advance(task)
            if not visible and time.monotonic() - beginning > _SILENT_SECONDS:
                visible = True
                if display.console.is_terminal:
                    display.start()
                display.update(task, visible=True, refresh=True)
            yield result
    finally:
        display.remove_task(task)
        if alone and display.live.is_started:
            display.stop()
