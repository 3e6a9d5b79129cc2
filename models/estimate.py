"""How long a run will take: foretold from timed steps, and corrected by the time that they really take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

_LINE_INTERVAL_S: Final = 60.0
_DOUBT_S: Final = 10.0  # of work, before the time that it took says much


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Attributes:
        task: name of its progress bar.
        label: what it is called in the estimate; parts in a row with the same label are added up.
        steps: of the progress bar.
        seconds: that all steps take.
        seconds_after: that follow, without a progress bar.
    """

    task: str
    label: str
    steps: int
    seconds: float
    seconds_after: float = 0.0

    def left(self, done: int) -> float:
        """Seconds that are left after so many steps."""
        return self.seconds * (1 - done / self.steps if self.steps else 0) + self.seconds_after


class Estimate:
    """The time that is left of a run, whose parts come one after another."""

    def __init__(self, parts: Sequence[Part], clock: Callable[[], float] = time.monotonic) -> None:
        self._parts = tuple(parts)
        self._clock = clock
        self._current = 0
        self._done = 0
        self._began_at: float | None = None
        self._work = 0.0  # that was left in the beginning, in foretold seconds

    def begin(self, task: str, done: int) -> None:
        """A part begins, of which `done` steps are done; parts before it are over."""
        names = [part.task for part in self._parts]
        if task in names:
            self._current, self._done = names.index(task), done
            if self._began_at is None:
                self._began_at, self._work = self._clock(), self._left()

    def advance(self, steps: int) -> None:
        """That many more steps are done."""
        self._done += steps

    @property
    def seconds_left(self) -> float:
        """Until the end of the run, at the pace so far."""
        left = self._left()
        if self._began_at is None:
            return left
        elapsed, done = self._clock() - self._began_at, self._work - left
        return left * (elapsed + _DOUBT_S) / (done + _DOUBT_S)

    def __str__(self) -> str:
        """What will take how long."""
        times: dict[str, float] = {}
        for place, part in enumerate(self._parts[self._current :]):
            left = part.left(0 if place else self._done)
            times[part.label] = times.get(part.label, 0.0) + left
        parts = ", ".join(f"{label} {in_words(seconds)}" for label, seconds in times.items() if seconds)
        return f"about {in_words(sum(times.values()))}" + (f" ({parts})" if len(times) > 1 else "")

    def _left(self) -> float:
        later = self._parts[self._current + 1 :]
        current = self._parts[self._current].left(self._done) if self._parts else 0.0
        return current + sum(part.left(0) for part in later)


class RunProgress(Progress):
    """Bars of trainings, with the time that is left of all; without a terminal, a line now and then."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[info]}"))
        super().__init__(*columns, _TimeLeft(self), console=console, transient=True)
        self.estimate: Estimate | None = None
        self.foretold_s: float | None = None
        self.told_at = self._line_at = time.monotonic()

    def add_task(
        self,
        description: str,
        start: bool = True,
        total: float | None = 100.0,
        completed: int = 0,
        visible: bool = True,
        **fields: object,
    ) -> TaskID:
        """A bar; the first one tells what the run will take."""
        if self.estimate is not None:
            self.estimate.begin(description, completed)
            if self.foretold_s is None:
                self.foretold_s, self.told_at = self.estimate.seconds_left, time.monotonic()
                self._say(f"this will take {self.estimate}")
        return super().add_task(description, start, total, completed, visible, **fields)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Move a bar."""
        if self.estimate is not None and changes.get("advance"):
            self.estimate.advance(int(changes["advance"]))
        super().update(task_id, **changes)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._line_at >= _LINE_INTERVAL_S:
            self._line_at = now
            task = self._tasks[task_id]
            self._say(f"{task.description}: {task.fields.get('info', '')}  {self.time_left()}")

    def time_left(self) -> str:
        """Of the whole run, in words."""
        return "" if self.estimate is None else f"about {in_words(self.estimate.seconds_left)} left"

    def took(self) -> str | None:
        """How long it has taken since the run's time was told, beside that; None: it was not told."""
        if self.foretold_s is None:
            return None
        took = in_words(time.monotonic() - self.told_at)
        return f"this took {took}; about {in_words(self.foretold_s)} were estimated"

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _TimeLeft(ProgressColumn):
    def __init__(self, progress: RunProgress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        """The same for all bars."""
        return Text(self._progress.time_left())


def in_words(seconds: float) -> str:
    """A length of time with about two digits, such as `45 s`, `12 min` or `2 h 05 min`."""
    if seconds < 99.5:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
