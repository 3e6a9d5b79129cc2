"""TensorRT's build phases as progress bars, and the way to stop a build."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from rich.progress import Progress, TaskID


class BuildListener(Protocol):
    """Follows a build; called from TensorRT's threads, one call at a time."""

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps begins, inside the phase `parent` or outermost."""

    def advanced(self, phase: str, step: int) -> None:
        """Step number `step`, counted from 0, is done."""

    def finished(self, phase: str) -> None:
        """A phase is over."""


class RichListener:
    """A bar for each phase that is running, nested ones indented.

    Accepts events in any order: phase names are no API, and a bar must not end a build.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._depth: dict[str | None, int] = {None: -1}

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """Add a bar."""
        self._depth[phase] = self._depth.get(parent, 0) + 1
        self._tasks[phase] = self._progress.add_task("  " * self._depth[phase] + phase, total=steps)

    def advanced(self, phase: str, step: int) -> None:
        """Move a bar."""
        if phase in self._tasks:
            self._progress.update(self._tasks[phase], completed=step + 1)

    def finished(self, phase: str) -> None:
        """Take a nested phase's bar away, there are dozens in one build; fill the outermost one."""
        task = self._tasks.pop(phase, None)
        if task is None:
            return
        if self._depth[phase] > 0:
            self._progress.remove_task(task)
        else:  # a build does not always take as many steps as it announces
            self._progress.update(task, total=1, completed=1)


class Monitoring:
    """Keeps a build's cancellation, and the first exception of its listener.

    TensorRT prints and swallows exceptions of callbacks, so they are kept here and raised after the build.
    """

    def __init__(self, listener: BuildListener | None) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self.failure: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        """Has someone asked for the build to end?"""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the build at its next step."""
        self._cancelled.set()

    def tell(self, event: str, *arguments: Any) -> None:
        """Call the listener's method `event`; end the build if it raises."""
        if self._listener is None:
            return
        try:
            with self._lock:
                getattr(self._listener, event)(*arguments)
        except BaseException as error:
            self.failure = self.failure or error
            self.cancel()

    def monitor(self, trt: Any) -> Any:
        """A `trt.IProgressMonitor` that reports here."""
        monitoring = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base class is known only now
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                monitoring.tell("started", phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                monitoring.tell("advanced", phase_name, step)
                return not monitoring.cancelled

            def phase_finish(self, phase_name: str) -> None:
                monitoring.tell("finished", phase_name)

        return Monitor()
