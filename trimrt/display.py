"""Where the work of `trimrt build` and `trimrt prepare` stands, on standard error."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from builder.compile.packages import Package
from builder.observer import BuildObserver
from builder.prepare.sensitivity import LayerCost
from models.bars import bars_in
from runtime.manifest import Backend, Manifest
from trimrt.output import milliseconds


class _StepsColumn(BarColumn):
    """A bar for what has a known number of steps."""

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
        """The bar, or nothing."""
        return Text() if task.total is None else super().render(task)


class Display(BuildObserver):
    """Where the work stands, on standard error: one line that changes, below lines that stay."""

    progress: Progress

    def __init__(self) -> None:
        self._packages: list[Package] = []
        self._stack = ExitStack()
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
        self._stack.enter_context(bars_in(self.progress))
        if self.progress.console.is_terminal:  # elsewhere it would be an empty line
            self._stack.enter_context(self.progress)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def report(self, step: str) -> None:
        """Change the line."""
        self.progress.update(self._task, description=step)

    def chose_target(self, target: Backend, reason: str) -> None:
        """Say what `--target auto` chose, and why."""
        self.note(f"target: [bold]{target}[/] ({escape(reason)})")

    def noted(self, finding: str) -> None:
        """Say what was found."""
        self.note(escape(finding))

    def exported(self, difference: float) -> None:
        """Say how exact the export is."""
        self.note(f"the exported graph's logits differ by {difference:.1e} at most")

    def ranked_layers(self, costs: Sequence[LayerCost]) -> None:
        """Show the layers as a table."""
        table = Table(box=SIMPLE_HEAD)
        table.add_column("layer")
        table.add_column("logit error if quantised alone", justify="right")
        for cost in costs:
            table.add_row(escape(cost.layer), f"{cost.error:.3%}")
        self.note(table)

    def note(self, text: RenderableType) -> None:
        """What was found, to stay."""
        self.progress.console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    def published(self, package: Package) -> None:
        """Say where a package is, and what it took."""
        self._packages.append(package)
        for line in package.rejected:
            self.note(f"[yellow]rejected[/] {escape(line)}")
        self.note(f"[green]published[/] {escape(str(package.folder))} (version {package.manifest.version})")
        if package.unverified is not None:
            self.note(f"[yellow]NOT verified[/]: {escape(package.unverified)}")
        if package.slower is not None:
            self.note(f"[yellow]{package.manifest.precision}[/] is {package.slower}")
        for line in package.missed:
            self.note(f"[yellow]promise missed[/]: {escape(line)}")

    def note_evidence(self) -> None:
        """Show how accurate and how fast the packages are that were published."""
        verified = [package.manifest for package in self._packages if package.manifest.evidence is not None]
        if verified:
            self.note(_evidence_table(verified))
            for line in _evidence_legend(verified):
                self.note(line)


def _evidence_legend(manifests: Sequence[Manifest]) -> list[str]:
    legend = ["MB: weights. INT8: of the work. FP32: the original's top-1. ms: one image."]
    evidences = [manifest.evidence for manifest in manifests if manifest.evidence is not None]
    if any(evidence.originals not in (None, evidence.images) for evidence in evidences):
        legend.append("Top-1 is of the images as they are, agreement of shifted copies, too.")
    if any(evidence.engine_top1 is None for evidence in evidences):
        legend.append("The images have no labels: agreement with FP32 alone was judged.")
    return legend


def _evidence_table(manifests: Sequence[Manifest]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    # Short enough for 80 columns.
    for heading in ("precision", "MB", "INT8", "FP32", "top-1", "agreed", "ms", "images/s"):
        table.add_column(heading, justify="left" if heading == "precision" else "right", no_wrap=True)
    for manifest in manifests:
        evidence, int8_share = manifest.evidence, manifest.provenance.int8_share
        if evidence is not None:
            table.add_row(
                manifest.precision,
                f"{evidence.weights_bytes / 1e6:.2f}",
                "-" if int8_share is None else f"{int8_share:.0%}",
                _share(evidence.reference_top1),
                _share(evidence.engine_top1),
                _share(evidence.label_agreement),
                milliseconds(evidence.latency_ms),
                f"{evidence.throughput:,.0f}",
            )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
