"""Where the work of `trimrt build` and `trimrt prepare` stands, on standard error."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from builder.compile.packages import Package
from builder.compile.targets.tensorrt.progress import BuildListener, RichListener


class _StepsColumn(BarColumn):
    """A bar for what has a known number of steps."""

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
        """The bar, or nothing."""
        return Text() if task.total is None else super().render(task)


class Display:
    """Where the work stands, on standard error: one line that changes, below lines that stay."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            _StepsColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self.progress.add_task("", total=None)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def report(self, text: str) -> None:
        """What is being done now."""
        self.progress.update(self._task, description=text)

    def listener(self) -> BuildListener:
        """Shows TensorRT's build phases as bars below the line that changes."""
        return RichListener(self.progress)

    def note(self, text: RenderableType) -> None:
        """What was found, to stay."""
        self.progress.console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    def note_package(self, package: Package) -> None:
        """Where a package is, and what it took."""
        for line in package.rejected:
            self.note(f"[yellow]rejected[/] {escape(line)}")
        self.note(f"[green]published[/] {escape(str(package.folder))} (version {package.manifest.version})")
        if package.unverified is not None:
            self.note(f"[yellow]NOT verified[/]: {escape(package.unverified)}")
        if package.slower is not None:
            self.note(f"[yellow]{package.manifest.precision}[/] is {package.slower}")
